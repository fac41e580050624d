"""Reports of a run: a text table, a JSON record, Markdown for the support matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from portalm import __version__
from portalm.backend import Backend
from portalm.conformance.base import LEVELS
from portalm.conformance.check import Result


def counts(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Count passed, failed and not claimed cases by level."""
    found: dict[str, dict[str, int]] = {}
    for result in results:
        level = found.setdefault(result.level, {"pass": 0, "fail": 0, "unsupported": 0})
        level[result.status] += 1
    return found


def as_table(device: str, results: Sequence[Result]) -> str:
    """Format one line per level, then every failure with its numbers."""
    lines = [
        f"conformance of {device}",
        f"{'level':<36}{'pass':>6}{'fail':>6}{'not claimed':>13}{'seconds':>9}",
    ]
    for level, count in counts(results).items():
        seconds = sum(r.seconds for r in results if r.level == level)
        lines.append(
            f"{level + ' ' + LEVELS[level]:<36}{count['pass']:>6}{count['fail']:>6}"
            f"{count['unsupported']:>13}{seconds:>9.1f}"
        )
    lines += [
        f"\nFAILED {result.level} {result.name}\n  {result.message}"
        for result in results
        if result.status == "fail"
    ]
    return "\n".join(lines)


def as_json(backend: Backend, results: Sequence[Result], *, checked: str = "run") -> str:
    """Format everything as JSON; `checked`: "run" (on the device), "emulated" or "interpreted"."""
    claims = asdict(backend.capabilities)
    for name, value in claims.items():
        if isinstance(value, frozenset):
            claims[name] = sorted(value)
    record: dict[str, Any] = {
        "portalm": __version__,
        "device": backend.name,
        "checked": checked,
        "summary": backend.find().summary,
        "capabilities": claims,
        "counts": counts(results),
        "results": [asdict(result) for result in results],
    }
    return json.dumps(record, indent=1) + "\n"


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Format records of `as_json` as the support matrix: tables of levels, models and formats."""
    return "\n".join((_levels(records), _models(records), _formats(records)))


def _levels(records: Sequence[dict[str, Any]]) -> str:
    levels = list(LEVELS)
    lines = [
        "| device | how | dtypes | features | " + " | ".join(levels) + " | checked on |",
        "|---|---|---|---|" + "---|" * (len(levels) + 1),
    ]
    for record in records:
        claims = record["capabilities"]
        cells = []
        for level in levels:
            count = record["counts"].get(level)
            cells.append(
                "not run"
                if count is None
                else f"{count['pass']} of {count['pass'] + count['fail']}"
            )
        lines.append(
            f"| {record['device']} | {record['checked']} | {', '.join(claims['dtypes'])} | "
            f"{', '.join(claims['features']) or '-'} | {' | '.join(cells)} | {record['summary']} |"
        )
    return "\n".join(lines) + "\n"


def _models(records: Sequence[dict[str, Any]]) -> str:
    """Format the worst result of each model's L3 checks."""
    found: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for result in record["results"]:
            if result["level"] == "L3":
                model = found.setdefault(result["case"], {})
                model.setdefault(record["device"], set()).add(result["status"])
    devices = [record["device"] for record in records]
    lines = [f"| model | {' | '.join(devices)} |", "|---" * (len(devices) + 1) + "|"]
    for name, by_device in sorted(found.items()):
        cells = [_worst(by_device.get(device, set())) for device in devices]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _worst(statuses: set[str]) -> str:
    names = {"fail": "fails", "unsupported": "not claimed", "pass": "passes"}
    return next((text for status, text in names.items() if status in statuses), "not run")


def _formats(records: Sequence[dict[str, Any]]) -> str:
    """Format the quantized weights and KV dtypes that each device keeps unconverted."""
    lines = ["| device | quantized weights | keys and values |", "|---|---|---|"]
    for record in records:
        claims = record["capabilities"]
        weights = ", ".join(claims["quantizations"]) or "-"
        lines.append(f"| {record['device']} | {weights} | {', '.join(claims['kv_dtypes'])} |")
    return "\n".join(lines) + "\n"
