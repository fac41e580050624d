"""Where a step's time goes: kernels, waiting for other threads, Python.

    python benchmarks/engine/profile_steps.py [--quantization int8] [--streams 1,32]

Decode steps only: all prompts are in before the clock starts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.sampling_params import SamplingParams

NUM_STEPS = 48


def fill(engine: Engine, streams: int, length: int) -> None:
    """`streams` requests that have computed their prompts."""
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS + 20, ignore_eos=True)
    for i in range(streams):
        prompt = [rng.randrange(100, 40_000) for _ in range(length)]
        engine.add(AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params, seed=0))
    num_drawn = 0
    while num_drawn < streams:
        num_drawn += sum(bool(o.token_ids) for o in engine.step().outputs)


def profile(engine: Engine, streams: int, length: int) -> dict[str, float]:
    """Milliseconds a decode step: in all, by kernel, waiting, Python."""
    fill(engine, streams, length)
    recorded: Any = next(iter(engine.runner.graphs._captured.values()))
    engine.step()
    recorded.profile(True)
    recorded.take_seconds()
    times = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    seconds = recorded.take_seconds()
    recorded.profile(False)
    engine.abort([str(i) for i in range(streams)])
    waiting = seconds.pop("waiting")
    table = {name: 1e3 * s / NUM_STEPS for name, s in seconds.items()}
    mean = 1e3 * statistics.mean(times)
    return {
        "step (median)": 1e3 * statistics.median(times),
        "step (mean)": mean,
        **table,
        "Python and sampling": mean - sum(table.values()),
        "waiting for threads (within the kernels)": 1e3 * waiting / NUM_STEPS,
    }


def main() -> None:
    """Print a table for each number of streams."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--context", type=int, default=160)
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
    for streams in map(int, args.streams.split(",")):
        table = profile(engine, streams, args.context)
        mean = table["step (mean)"]
        print(f"{streams} streams, {1e3 * streams / table['step (median)']:.1f} tokens/s")
        for name, ms in table.items():
            print(f"  {name:42s} {ms:9.3f} ms  {100 * ms / mean:5.1f} %")


if __name__ == "__main__":
    main()
