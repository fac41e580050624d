"""Instruction counts of inner loops on AMD GPUs, and what the kernels must keep to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.amd_loops import TARGETS, inner_loops

ASSEMBLY = """
	s_mov_b32 s0, 0
.LBB0_1:                                ; outer
	v_mov_b32_e32 v0, 0
.LBB0_2:                                ; inner
	global_load_dwordx4 v[0:3], v[4:5], off
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v1, v1
	v_pk_mul_f32 v[0:1], v[0:1], v[2:3]
	; a comment
	s_cbranch_scc1 .LBB0_2
	s_cbranch_scc1 .LBB0_1
	s_cbranch_scc0 .LBB0_3
.LBB0_3:
	s_endpgm
"""


def test_cycles_of_the_innermost_loop() -> None:
    [loop] = inner_loops(ASSEMBLY)

    assert loop.counts() == {"matrix": 1, "global load": 1, "transcendental": 1, "vector": 1}
    assert loop.matrix_cycles("gfx942") == 32
    assert loop.matrix_cycles("gfx90a") == 64
    assert loop.vector_cycles() == 20


def printed(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.amd_loops", *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BYTES_PER_CYCLE = {
    "gfx90a": 1.6e12 / 104 / 1.7e9,  # MI210
    "gfx942": 6.0e12 / 304 / 2.1e9,  # MI325X
    "gfx950": 8.0e12 / 256 / 2.4e9,  # MI355X
}
"""Bytes that memory delivers to a compute unit, by the data sheet of the product with the most."""


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", TARGETS)
def test_few_rows_are_multiplied_faster_than_memory_delivers(target: str) -> None:
    """All loads are 16-byte vectors, and a SIMD computes faster than its share of a weight arrives.

    A wave loads 64 x 16 bytes at a time, and 4 SIMDs share what memory delivers to their unit.
    """
    lines = printed("--targets", target, "--only", "linear, bf16, ").splitlines()

    assert len(lines) == 3
    for line in lines:
        loads = dict(re.findall(r"'(\w+_load_\w+)': (\d+)", line))
        assert list(loads) == ["buffer_load_dwordx4"], line  # weights of less than 2 GiB
        rows = int(re.findall(r"(\d) row", line)[0])
        weight_vectors = int(loads["buffer_load_dwordx4"]) - rows
        arrives = weight_vectors * 64 * 16 / (BYTES_PER_CYCLE[target] / 4)
        cycles = int(re.findall(r"vector (\d+) cycles", line)[0])
        assert cycles < arrives, line
