"""Predictions for every goal on an H200."""

from __future__ import annotations

from typing import Any

GOALS: dict[str, tuple[float, float, str]] = {
    "8b: decode, 1 x 512": (286, 256, "tok/s"),
    "8b: decode, 64 x 1024": (11_660, 10_200, "tok/s"),
    "8b: decode, 256 x 1024": (19_915, 17_500, "tok/s"),
    "8b: prefill, 2048": (54_000, 43_000, "tok/s"),
    "8b: TTFT, 1024": (18.5, 24, "ms"),
    "8b: offline, 1000 requests": (20_700, 16_000, "tok/s"),
    "8b: exec to first token": (0, 8, "s"),
    "decode attention, 64 x 1024": (4.3, 0.88 * 4.3, "TB/s"),
    "decode attention, 64 x 8192": (4.3, 0.92 * 4.3, "TB/s"),
    "experts, 64 tokens": (4.3, 0.75 * 4.3, "TB/s"),
    "experts, 8192 tokens": (790, 0.5 * 790, "TFLOP/s"),
    "8b: idle at 256 streams": (0, 1, "%"),
    "1b: idle at 64 streams": (0, 5, "%"),
}
"""(limit, goal, unit) on an H200, from 4.3 TB/s and 790 TFLOP/s measured in a calibration."""


def predictions() -> dict[str, dict[str, Any]]:
    """Limit, goal and prediction of each figure that has a goal."""
    return {
        name: {"limit": limit, "goal": goal, "predicted": None, "unit": unit}
        for name, (limit, goal, unit) in GOALS.items()
    }
