"""No operation compiles a kernel again for another number of rows, on a dry GPU.

Another process launches the operations, because this one interprets kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

VARIANTS = {
    "_matmul": 3,  # tiles of 16, 32 and 128 rows
    "_product": 4,  # tiles of 16 and 128 choices, of gate and up, then down
    "_sort": 2,
    "_count": 2,  # tokens of the prompt, and of the answer
}
"""Compilations of kernels that exist in several variants, which startup covers; others: 1."""


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_are_compiled_once_for_all_step_sizes(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.step_sizes", target],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)

    again = {
        (operation, kernel): count
        for operation, kernels in found.items()
        for kernel, count in kernels.items()
        if count > VARIANTS.get(kernel, 1)
    }
    assert again == {}
    # the operations did launch: these have one kernel, which nothing before them compiled
    for operation, kernel in (
        ("rms_norm", "_norm"),
        ("sample", "_scan"),
        ("silu_mul", "_silu_mul"),
    ):
        assert found[operation][kernel] == 1
