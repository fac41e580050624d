"""`portalm bench throughput`: speed of an engine that gets all requests at once."""

from __future__ import annotations

import argparse

from portalm.cli.bench.offline import add_offline_flags


def add_bench_throughput(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm bench throughput`: requests and tokens per second, without a server."""
    parser = kinds.add_parser("throughput", help="tokens per second of an engine in this process")
    parser.add_argument(
        "--num-prompts", type=int, default=100, help="number of requests, all submitted at once"
    )
    parser.add_argument(
        "--fixed-lengths",
        action="store_true",
        help="use exactly these lengths; otherwise lengths vary around them",
    )
    add_offline_flags(parser, input_len=200, output_len=120)
    parser.set_defaults(run=run_bench_throughput)


def run_bench_throughput(arguments: argparse.Namespace) -> int:
    """Answer all prompts and print a table."""
    import random
    import time

    from portalm.cli.bench.figures import report, sample_length
    from portalm.cli.bench.offline import answer_of, describe, load, make_prompt
    from portalm.errors import ConfigError

    if arguments.num_prompts < 1:
        raise ConfigError(f"--num-prompts must be at least 1, not {arguments.num_prompts}")
    llm = load(arguments)
    rng = random.Random(llm.engine.config.seed)
    room = llm.engine.max_model_len
    prompts, answers = [], []
    for _ in range(arguments.num_prompts):
        num_in, num_out = (
            sample_length(rng, mean, is_fixed=arguments.fixed_lengths)
            for mean in (arguments.input_len, arguments.output_len)
        )
        num_in = min(num_in, room - 1)
        prompts.append(make_prompt(rng, llm, num_in))
        answers.append(answer_of(min(num_out, room - num_in)))

    started = time.perf_counter()
    outputs = llm.generate(prompts, answers)
    duration_s = time.perf_counter() - started

    num_in = sum(len(one.prompt_token_ids) for one in outputs)
    num_out = sum(len(one.outputs[0].token_ids) for one in outputs)
    report(
        {
            **describe(llm),
            "num_prompts": len(outputs),
            "prompt_tokens": num_in,
            "generated_tokens": num_out,
            "duration_s": duration_s,
            "request_throughput": len(outputs) / duration_s,
            "output_throughput": num_out / duration_s,
            "total_token_throughput": (num_in + num_out) / duration_s,
        },
        arguments.result_json,
    )
    return 0
