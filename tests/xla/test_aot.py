"""Compile programs for TPUs on a machine without one and check their budgets. Nothing is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="libtpu, which contains the TPU compiler, is not installed")

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "ci"))
import xla_compile  # noqa: E402 - a command, not a package

_ROW = {
    "program": "p",
    "seconds": 1.0,
    "least_ms": 0.5,
    "arguments": 9,
    "temporaries": 8,
    "aliased": 7,
    "output": 6,
    "kv_cache": 7,
    "kernels": 2,
}


def test_every_kernel_compiles_for_every_target_within_its_budgets():
    command = [sys.executable, str(ROOT / "ci" / "xla_compile.py"), "--kernels"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(xla_compile.TARGETS) * len(xla_compile.KERNELS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"aliased": 6}, "1 bytes of the KV cache are copied"),
        ({"temporaries": 300_000_000}, "above 200000000"),
        ({"kernels": 0}, "no kernel"),
    ],
    ids=lambda x: str(x),
)
def test_a_broken_budget_is_reported(change, text):
    assert xla_compile.broken_budgets(_ROW) == []
    [message] = xla_compile.broken_budgets({**_ROW, **change})
    assert text in message
