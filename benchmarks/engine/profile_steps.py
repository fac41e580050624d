"""Show where a step's time goes: kernels, waiting for other threads, Python.

    python benchmarks/engine/profile_steps.py [--quantization int8] [--streams 1,32] [--prefill 512]

Measures steps that compute only a prompt of --prefill tokens, then decode steps of --streams
requests whose prompts were computed before.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.sampling_params import SamplingParams

NUM_STEPS = 48
NUM_PREFILLS = 8


def ask(engine: Engine, name: str, length: int, num_out: int) -> None:
    """Add a request of `length` random tokens."""
    rng = random.Random(f"{name} {length}")
    prompt = [rng.randrange(100, 40_000) for _ in range(length)]
    params = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
    engine.add(AddRequest(request_id=name, prompt_token_ids=prompt, params=params, seed=0))


def fill(engine: Engine, streams: int, length: int) -> None:
    """Start `streams` requests and compute their prompts."""
    for i in range(streams):
        ask(engine, str(i), length, NUM_STEPS + 20)
    num_sampled = 0
    while num_sampled < streams:
        num_sampled += sum(bool(o.token_ids) for o in engine.step().outputs)


def profile_decode(engine: Engine, streams: int, length: int) -> dict[str, float]:
    """Measure milliseconds per decode step: total, by kernel, waiting, Python."""
    fill(engine, streams, length)
    engine.step()
    table = profile(engine, lambda i: None, NUM_STEPS)
    engine.abort([str(i) for i in range(streams)])
    return table


def profile_prefill(engine: Engine, length: int) -> dict[str, float]:
    """Measure steps that compute a prompt of `length` tokens each and sample one token."""
    return profile(engine, lambda i: ask(engine, f"prefill {i}", length, 1), NUM_PREFILLS)


def profile(engine: Engine, before: Callable[[int], None], num_steps: int) -> dict[str, float]:
    """Measure milliseconds per step; `before` is called before each step."""
    recorded: Any = next(iter(engine.runner.graphs._captured.values()))
    recorded.profile(True)
    recorded.take_seconds()
    times = []
    for i in range(num_steps):
        before(i)
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    seconds = recorded.take_seconds()
    recorded.profile(False)
    waiting = seconds.pop("waiting")
    table = {name: 1e3 * s / num_steps for name, s in seconds.items()}
    mean = 1e3 * statistics.mean(times)
    return {
        "step (median)": 1e3 * statistics.median(times),
        "step (mean)": mean,
        **table,
        "Python and sampling": mean - sum(table.values()),
        "waiting for threads (within the kernels)": 1e3 * waiting / num_steps,
    }


def show(title: str, num_tokens: int, table: dict[str, float]) -> None:
    """Print one line per kernel."""
    print(f"{title}, {1e3 * num_tokens / table['step (median)']:.1f} tokens/s")
    for name, ms in table.items():
        print(f"  {name:42s} {ms:9.3f} ms  {100 * ms / table['step (mean)']:5.1f} %")


def main() -> None:
    """Print a table for each number of streams."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--prefill", type=int, default=512)
    args = parser.parse_args()
    engine = Engine(
        EngineConfig(
            model=args.model,
            device="cpu",
            dtype=args.dtype,
            quantization=args.quantization,
            enable_prefix_caching=False,
        )
    )
    ask(engine, "first", 40, 2)
    while engine.has_work():
        engine.step()
    if args.prefill:
        show(f"prefill of {args.prefill}", args.prefill, profile_prefill(engine, args.prefill))
    for streams in map(int, args.streams.split(",")):
        show(f"{streams} streams", streams, profile_decode(engine, streams, args.context))


if __name__ == "__main__":
    main()
