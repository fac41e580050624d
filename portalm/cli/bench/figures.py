"""Shared by all benchmarks: request lengths, percentiles, the table and the result file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)
_SPREAD = 0.6
"""Standard deviation of the logarithm of the lengths, about that of conversations."""


def sample_length(rng: random.Random, mean: int, *, is_fixed: bool) -> int:
    """Return `mean`, or a length from a log-normal distribution with that mean."""
    if is_fixed:
        return mean
    # exp of a normal variable with this mean and deviation has mean `mean`
    length = rng.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD)
    return max(1, min(round(length), 8 * mean))


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile of `values` by linear interpolation between the two nearest."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread_ms(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds, by name; empty if there are no values."""
    if not seconds:
        return {}
    found = {f"mean_{name}_ms": 1000 * sum(seconds) / len(seconds)}
    for percent in PERCENTILES:
        found[f"p{percent}_{name}_ms"] = 1000 * percentile(seconds, percent)
    return found


def report(figures: Mapping[str, Any], result_json: str | None) -> None:
    """Print a table of figures, and write them to the file `result_json` if given."""
    for name, value in figures.items():
        shown = f"{value:.2f}" if isinstance(value, float) else value
        print(f"{name:24s} {shown}")
    if result_json:
        Path(result_json).write_text(json.dumps(figures, indent=2) + "\n")
