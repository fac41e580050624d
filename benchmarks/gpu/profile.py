"""Steady decoding: the device's idle time, and the time of each kernel."""

from __future__ import annotations

import time
from typing import Any

from gpu.common import Settings, report


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
    import torch

    from gpu.engine import ask, finish

    num_steps = 4 if run.is_dry else run.scaled(40, 2)
    for i in range(streams):
        ask(engine, f"steady-{i}", run.scaled(512, 8), 3 * num_steps + 40)
    while sum(len(o.token_ids) for o in engine.step().outputs) < streams:
        pass
    begin = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    step_s = (time.perf_counter() - begin) / num_steps
    is_on_device = engine.backend.device().type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CUDA if is_on_device else activity.CPU]
    ) as profiler:
        for _ in range(num_steps):
            engine.step()
        if is_on_device:
            torch.cuda.synchronize()
    spans: list[tuple[float, float]] = []
    by_name: dict[str, float] = {}
    for event in profiler.events():
        if is_on_device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spans.append((event.time_range.start, event.time_range.end))
        length = event.time_range.end - event.time_range.start
        by_name[event.name] = by_name.get(event.name, 0.0) + length
    engine.abort([f"steady-{i}" for i in range(streams)])
    finish(engine)
    report(f"{model}: step of {streams} decodes", step_s * 1e3, "ms")
    report(f"{model}: idle at {streams} streams", 100 * idle_share(spans), "%")
    top = sorted(by_name.items(), key=lambda item: -item[1])[:16]
    report(
        f"{model}: kernels of a step at {streams} streams",
        None,
        us={name[:80]: round(total / num_steps, 2) for name, total in top},
    )
