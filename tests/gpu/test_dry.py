"""The engine's launch path on a dry GPU: kernels compiled for real GPUs, and not launched.

Another process does it, because this one interprets kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
TARGETS += ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]


def dry(folder: Path, target: str, *arguments: str) -> list[dict[str, Any]]:
    """Run benchmarks/gpu_dry.py for `target`; return its reports, fail on its errors."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = folder / "dry.json"
    command = [sys.executable, "benchmarks/gpu_dry.py", "--target", target, "--json", str(out)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    reports: list[dict[str, Any]] = json.loads(out.read_text())
    return reports


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", TARGETS)
def test_the_engine_starts_captures_and_serves(tmp_path: Path, target: str) -> None:
    small = ("--model", "1b", "--layers", "2", "--requests", "8")

    start, captures, *served = dry(tmp_path, target, "--parts", "engine", *small)

    assert start["compiles"]
    assert captures["captures"] > 0
    assert sum(part["replays"] for part in served) > 0
    assert not any(part["compiles"] or part["waits"] for part in served)


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", TARGETS)
def test_the_kits_shapes_compile_and_launch(tmp_path: Path, target: str) -> None:
    launched = dry(tmp_path, target, "--parts", "kit")

    assert all(sum(part["launches"].values()) for part in launched)
