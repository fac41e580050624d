"""Every GPU kernel compiles for every target within the resources of kernel_budgets.json.

Kernels are compiled in another process, because this one interprets them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "tests/gpu/kernel_budgets.json").read_text())
TARGETS = sorted({target for row in TABLE.values() for target in row})


def compile_within_budget(target: str, only: str = "") -> str:
    """Compile the kernels whose name contains `only`; return the output, fail if over budget."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.kernel_budgets", "--targets", target, "--only", only],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_within_its_budget(target: str) -> None:
    printed = compile_within_budget(target)

    for name, row in TABLE.items():
        assert target not in row or name in printed


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_cache_kernels_are_within_their_budget(target: str) -> None:
    assert "cache, write" in compile_within_budget(target, "cache, ")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx950", "gfx1201"])
def test_kernels_of_common_models_spill_no_registers(target: str) -> None:
    rare = ("fp32", "all features")  # all: windows, caps, slopes and sinks at once
    spilling = [
        name
        for name, row in TABLE.items()
        if target in row and row[target]["spills"] and not any(word in name for word in rare)
    ]

    assert not spilling
