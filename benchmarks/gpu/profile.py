"""Profile steady decoding: the device's idle time, and the time of each kernel."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from gpu.common import Settings, report, settings
from gpu.engine import ask, finish, make_engine


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Fraction of the time from first begin to last end that no (begin, end) span covers."""
    spans.sort()
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return 1 - busy / (until - spans[0][0])


def steady(engine: Any, run: Settings, model: str, streams: int) -> None:
    """Measure decode steps with and without torch's profiler."""
    num_steps = run.scaled(40, 2)
    for i in range(streams):
        ask(engine, f"steady-{i}", run.scaled(512, 8), 3 * num_steps + 40)
    while sum(len(o.token_ids) for o in engine.step().outputs) < streams:
        pass
    begin = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    step_s = (time.perf_counter() - begin) / num_steps
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not run.is_tiny:
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_steps):
            engine.step()
        if not run.is_tiny:
            torch.cuda.synchronize()
    spans, by_name = [], {}
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device or run.is_tiny:
            spans.append((event.time_range.start, event.time_range.end))
            length = event.time_range.end - event.time_range.start
            by_name[event.name] = by_name.get(event.name, 0.0) + length
    engine.abort([f"steady-{i}" for i in range(streams)])
    finish(engine)
    report(f"{model}: step of {streams} decodes", step_s * 1e3, "ms")
    report(f"{model}: idle at {streams} streams", 100 * idle_share(spans), "%")
    top = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    report(
        f"{model}: kernels of a step at {streams} streams",
        None,
        us={name[:80]: round(total / num_steps, 2) for name, total in top},
    )


def main() -> None:
    """Profile the model that the second argument names."""
    run, model = settings(), sys.argv[2]
    engine = make_engine(run, model)
    for streams in (64, 256) if not run.is_tiny else (2,):
        steady(engine, run, model, streams)
    engine.close()


if __name__ == "__main__":
    main()
