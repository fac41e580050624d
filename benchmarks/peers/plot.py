"""Plot one result file: `python -m peers.plot RESULT.json` writes RESULT.png."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from peers.report import COLUMNS, OWN, SCALE, median

_PANELS = tuple(name for name in COLUMNS if name != "rss_bytes")
_COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#8c8c8c")


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot one row of panels per model and format, one panel per column, one bar per peer."""
    pyplot: Any = import_module("matplotlib.pyplot")
    keys = list(dict.fromkeys((row["model"], row["fmt"]) for row in result["rows"]))
    peers = list(dict.fromkeys(row["peer"] for row in result["rows"]))
    figure, axes = pyplot.subplots(
        len(keys), len(_PANELS), figsize=(3 * len(_PANELS), 2.6 * len(keys)), squeeze=False
    )
    for line, (model, fmt) in enumerate(keys):
        rows = {r["peer"]: r for r in result["rows"] if (r["model"], r["fmt"]) == (model, fmt)}
        limits = result["limits"].get(f"{model} {fmt}", {})
        for axis, column in zip(axes[line], _PANELS, strict=True):
            _draw_panel(axis, peers, rows, column, limits.get(column))
        axes[line][0].set_ylabel(f"{model}\n{fmt}")
    for axis, column in zip(axes[0], _PANELS, strict=True):
        axis.set_title(COLUMNS[column], fontsize=9)
    figure.suptitle(
        f"{result['cpu']}, {result['num_cpus']} CPUs, {result['date']}; "
        f"dashed: the limit of memory bandwidth and multiply-adds"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)


def _draw_panel(
    axis: Any, peers: list[str], rows: dict[str, Any], column: str, limit: float | None
) -> None:
    scale = SCALE.get(column, 1.0)
    for i, peer in enumerate(peers):
        middle = median(rows[peer], column) if peer in rows else None
        if middle is None:
            axis.text(i, 0, " none", rotation=90, ha="center", va="bottom", fontsize=7)
            continue
        values = [value * scale for value in rows[peer]["figures"][column]]
        middle *= scale
        spread = [[middle - min(values)], [max(values) - middle]]
        width = 2 if peer == OWN else 0
        colour = _COLOURS[i % len(_COLOURS)]
        axis.bar(i, middle, yerr=spread, color=colour, edgecolor="black", linewidth=width)
    if limit is not None:
        axis.axhline(limit * scale, linestyle="--", color="black", linewidth=1)
    axis.set_xticks(range(len(peers)), peers, rotation=60, ha="right", fontsize=7)
    axis.tick_params(axis="y", labelsize=7)


def main() -> None:
    """Plot the file given on the command line."""
    path = Path(sys.argv[1])
    import_module("matplotlib").use("Agg")
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
