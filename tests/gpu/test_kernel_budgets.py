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


LOOPS = """
from tests.gpu.loop_instructions import CACHES, decode_times, per_64_tokens
for cache in CACHES:
    instructions, cycles = per_64_tokens("narrow", cache)
    print(cache, instructions, *decode_times(cache, cycles))
"""


@pytest.mark.gpu_compiled
def test_decodes_over_8_bit_caches_take_at_most_0_6_of_the_time() -> None:
    """Of the time that bytes and instructions of the compiled kernels for sm_90 allow."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOOPS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in
            done.stdout.splitlines()}  # fmt: skip
    time = {cache: max(row[1:]) for cache, row in rows.items()}

    for cache, most in (("fp8", 4 * 470), ("int8", 4 * 575)):
        assert rows[cache][0] <= most
        assert time[cache] <= 0.6 * time["bf16"]
