"""`portalm bench latency`: the time one batch takes."""

from __future__ import annotations

import argparse

from portalm.cli.bench.offline import add_offline_flags


def add_bench_latency(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm bench latency`: time one batch, without a server."""
    parser = kinds.add_parser("latency", help="time one batch of an engine in this process")
    parser.add_argument("--batch-size", type=int, default=8, help="requests per batch")
    parser.add_argument(
        "--num-iters-warmup", type=int, default=2, help="batches to run before measuring"
    )
    parser.add_argument("--num-iters", type=int, default=10, help="batches to measure")
    add_offline_flags(parser, input_len=32, output_len=128)
    parser.set_defaults(run=run_bench_latency)


def run_bench_latency(arguments: argparse.Namespace) -> int:
    """Answer batches of new prompts and print a table."""
    import random
    import time

    from portalm.cli.bench.figures import report, spread_ms
    from portalm.cli.bench.offline import answer_of, describe, load, make_prompt
    from portalm.errors import ConfigError
    from portalm.progress import ProgressBar

    for name in ("batch_size", "num_iters"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, not {getattr(arguments, name)}")
    llm = load(arguments)
    rng = random.Random(llm.engine.config.seed)
    answer = answer_of(arguments.output_len)
    batches_s = []
    num_batches = arguments.num_iters_warmup + arguments.num_iters
    with ProgressBar("Answering", num_batches, unit="batches") as bar:
        for _ in range(num_batches):
            prompts = [
                make_prompt(rng, llm, arguments.input_len) for _ in range(arguments.batch_size)
            ]
            started = time.perf_counter()
            llm.generate(prompts, answer, use_tqdm=False)
            batches_s.append(time.perf_counter() - started)
            bar.update()
    measured = batches_s[arguments.num_iters_warmup :]
    figures = spread_ms("latency", measured)
    report(
        {
            **describe(llm),
            "batch_size": arguments.batch_size,
            "input_len": arguments.input_len,
            "output_len": arguments.output_len,
            "num_iters": len(measured),
            **figures,
            "mean_token_ms": figures["mean_latency_ms"] / arguments.output_len,
        },
        arguments.result_json,
    )
    return 0
