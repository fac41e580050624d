"""`portalm generate`: answer one prompt in the terminal."""

from __future__ import annotations

import argparse

DEMO_PROMPT = "Explain in three sentences why the sky is blue."


def add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm generate`: answer a prompt and report the speed."""
    from portalm.cli.engine_flags import add_engine_flags

    parser = commands.add_parser("generate", help="answer one prompt in the terminal")
    parser.add_argument("prompt", nargs="?", default=DEMO_PROMPT, help="prompt to answer")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt without applying the chat template"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="maximum number of tokens to generate"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="nucleus sampling: total probability of the tokens to sample from",
    )
    parser.add_argument(
        "--sampling-seed",
        type=int,
        default=None,
        help="seed of the random numbers: the same seed gives the same answer "
        "(default: derived from --seed)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the answer")
    add_engine_flags(parser)
    parser.set_defaults(run=run_generate)


def run_generate(arguments: argparse.Namespace) -> int:
    """Stream the answer to stdout; progress and speed go to stderr."""
    import sys
    import time

    from portalm.cli.engine_flags import engine_settings
    from portalm.llm import LLM
    from portalm.prompts import Prompt
    from portalm.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.sampling_seed,
    )
    started = time.perf_counter()
    llm = LLM(**engine_settings(arguments), use_tqdm=not arguments.quiet)
    ready = llm.engine.ready
    if not arguments.quiet:
        print(
            f"{ready.model} in {ready.dtype} on {ready.device} ({ready.device_summary}), "
            f"loaded in {time.perf_counter() - started:.1f} s\n"
            f"> {arguments.prompt}\n",
            file=sys.stderr,
        )
    prompt: Prompt = arguments.prompt
    if not arguments.raw and llm.get_tokenizer().chat_template is not None:
        prompt = llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": arguments.prompt}]
        )

    sent = time.perf_counter()
    first = last = sent
    num_tokens = 0
    for delta in llm.stream(prompt, params):
        if delta.error is not None:
            print(f"\nportalm: {delta.error}", file=sys.stderr)
            return 1
        last = time.perf_counter()
        first = last if num_tokens == 0 else first
        num_tokens += len(delta.token_ids)
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print()
    if not arguments.quiet:
        rate = (num_tokens - 1) / (last - first) if num_tokens > 1 else 0.0
        print(
            f"\n{num_tokens} tokens, {rate:.1f} tokens/s, first token after "
            f"{(first - sent) * 1000:.0f} ms ({first - started:.1f} s including loading)",
            file=sys.stderr,
        )
    return 0
