"""Measure `schedule()` and `update()` for 256 running requests in microseconds, without a model.

python benchmarks/engine/scheduler.py [--requests 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

from portalm.config import SchedulerConfig
from portalm.core.plan import Sampled, StepResult
from portalm.core.request import Request
from portalm.core.scheduler import Scheduler
from portalm.sampling_params import SamplingParams

NUM_STEPS = 300


def measure(num_requests: int) -> tuple[float, float]:
    """Median microseconds of `schedule` and of `update` over a round of decode steps."""
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_requests=num_requests,
            max_batch_tokens=max(2048, num_requests),
            max_model_len=4096,
            num_blocks=80 * num_requests,
        )
    )
    params = SamplingParams(max_tokens=1000)
    for i in range(num_requests):
        prompt = [(i * 7 + j) % 30_000 for j in range(100)]
        scheduler.add(Request(str(i), prompt, params, seed=0, max_total_tokens=1100))
    planning, updating = [], []
    for number in range(NUM_STEPS):
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        result = StepResult([Sampled([5]) if p.samples_token else None for p in plan.requests])
        updated_from = time.perf_counter()
        scheduler.update(plan, result)
        if number >= 50:  # every prompt is computed by now
            planning.append(planned - start)
            updating.append(time.perf_counter() - updated_from)
    return statistics.median(planning) * 1e6, statistics.median(updating) * 1e6


def main() -> None:
    """Measure several rounds and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds = [measure(arguments.requests) for _ in range(arguments.rounds)]
    planning, updating = (statistics.median(x) for x in zip(*rounds, strict=True))
    print(
        f"{arguments.requests} running requests: schedule {planning:.0f} us, "
        f"update {updating:.0f} us, together {planning + updating:.0f} us"
    )


if __name__ == "__main__":
    main()
