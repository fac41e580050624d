"""Render the results as a Markdown table and as a plot."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.base import PeerUnavailable, Settings, Venv
from peers.cases import CASES

OWN = "portalm"
COLUMNS = {case.name: case.title for case in CASES} | {
    "start": "start to first token (s)",
    "pss_bytes": "peak memory, PSS (GB)",
    "rss_bytes": "peak memory, RSS (GB)",
}
SCALE = {"ttft": 1e3, "pss_bytes": 1e-9, "rss_bytes": 1e-9}
LOWER_IS_BETTER = frozenset({"ttft", "start", "pss_bytes", "rss_bytes"})


def to_markdown(result: dict[str, Any]) -> str:
    """Render a table per model and format, with the ratios to the best peer below it."""
    lines = [
        f"# Engines on {result['num_cpus']} CPUs, {result['date']}",
        "",
        f"{result['cpu']} ({', '.join(result['instructions'])}), {result['num_cpus']} CPUs; "
        f"{result['rounds']} rounds, every peer started anew in each.",
        "Cells: median (least to most of the rounds), then the share of the limit. The limit is "
        "that of the measured memory bandwidth and multiply-adds, overlapped perfectly. Greedy, "
        "the same token ids. Ratios above 1: PortaLM is better. CPU seconds over wall seconds: "
        f"near {result['num_cpus']} is sound for the engine, near 0 for the others on the machine.",
        "Written by benchmarks/compare_cpu.py.",
    ]
    if result["is_quick"]:
        lines += ["", "**A quick run: it shows that peers run, its figures say little.**"]
    keys = dict.fromkeys((row["model"], row["fmt"]) for row in result["rows"])
    for model, fmt in keys:
        rows = [row for row in result["rows"] if (row["model"], row["fmt"]) == (model, fmt)]
        lines += ["", f"## {model}, {fmt}", ""]
        lines += _table(rows, result["limits"].get(f"{model} {fmt}", {}), result["rounds"])
        lines += ["", *_ceiling_lines(result["ceilings"].get(f"{model} {fmt}", []))]
        lines += [
            f"- {row['peer']}: no figures: {row['problem']}" for row in rows if row["problem"]
        ]
    return "\n".join(lines) + "\n"


def median(row: dict[str, Any], column: str) -> float | None:
    """Return the median over the rounds; None where the peer has no figure."""
    values = row["figures"].get(column)
    return statistics.median(values) if values and not row["problem"] else None


def ratio(rows: Sequence[dict[str, Any]], column: str) -> tuple[float, str] | None:
    """Return PortaLM's ratio to the best other peer (above 1: PortaLM is better) and that peer."""
    medians = {row["peer"]: found for row in rows if (found := median(row, column)) is not None}
    own = medians.pop(OWN, None)
    if own is None or not medians:
        return None
    is_lower = column in LOWER_IS_BETTER
    best = (min if is_lower else max)(medians, key=lambda peer: medians[peer])
    return (medians[best] / own if is_lower else own / medians[best]), best


def _table(rows: Sequence[dict[str, Any]], limits: dict[str, float], num_rounds: int) -> list[str]:
    lines = [
        "| engine | " + " | ".join(COLUMNS.values()) + " | CPU s / wall s | others' |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for row in rows:
        cells = [_cell(row, column, limits, num_rounds) for column in COLUMNS]
        lines.append(f"| {row['peer']} {row['version']} | {' | '.join(cells)} | {_cpu(row)} |")
    cells = [f"{limits[c] * SCALE.get(c, 1):.4g}" if c in limits else "" for c in COLUMNS]
    lines.append(f"| the limit | {' | '.join(cells)} | | |")
    found = [ratio(rows, column) for column in COLUMNS]
    cells = ["" if one is None else f"**{one[0]:.2f}** ({one[1]})" for one in found]
    lines.append(f"| PortaLM against the best peer | {' | '.join(cells)} | | |")
    return lines


def _cell(row: dict[str, Any], column: str, limits: dict[str, float], num_rounds: int) -> str:
    middle = median(row, column)
    if middle is None:
        return ""
    scale = SCALE.get(column, 1.0)
    values = [value * scale for value in row["figures"][column]]
    text = f"{middle * scale:.4g}"
    if len(values) > 1:
        text += f" ({min(values):.4g} to {max(values):.4g})"
    elif num_rounds > 1:
        text += " (1 round)"
    if column in limits:
        share = limits[column] / middle if column in LOWER_IS_BETTER else middle / limits[column]
        text += f", {share:.0%}"
    return text


def _cpu(row: dict[str, Any]) -> str:
    """Format the lowest and highest CPU use over the columns, of the peer and of others."""
    if row["problem"] or not row["cpu_over_wall"]:
        return " | "
    own, others = (
        [statistics.median(values) for values in row[name].values()]
        for name in ("cpu_over_wall", "others_over_wall")
    )
    return f"{min(own):.2f} to {max(own):.2f} | {min(others):.2f} to {max(others):.2f}"


def _ceiling_lines(ceilings: Sequence[dict[str, float]]) -> list[str]:
    if not ceilings:
        return []
    reads = [one["read_bytes_s"] / 1e9 for one in ceilings]
    flops = [one["flops_s"] / 1e9 for one in ceilings]
    return [
        f"- ceilings: reads {statistics.median(reads):.1f} GB/s ({min(reads):.1f} to "
        f"{max(reads):.1f}), {statistics.median(flops):.0f} GFLOP/s ({min(flops):.0f} to "
        f"{max(flops):.0f})"
    ]


def draw_plot(result: Path, settings: Settings) -> None:
    """Write the plot next to the JSON file, with matplotlib in a separate environment."""
    venv = Venv(settings, "plot")
    try:
        venv.install(["matplotlib"])
    except PeerUnavailable as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    command = [str(venv.python), "-m", "peers.plot", str(result.resolve())]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
