"""Kernels that start before their predecessor is complete wait before they access memory.

test_kernel_budgets.py checks the compiled code of every kernel; these tests check the sources and
the check itself.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends.compiler import GPUTarget

from portalm_backends.gpu_common.kernels import dependent_launch

ROOT = Path(__file__).parents[2]
GPU = ROOT / "backends/gpu_common"


def kernels() -> dict[str, ast.FunctionDef]:
    """All functions with a parameter WAITS, by file and name."""
    return {
        f"{path.name}:{node.name}": node
        for path in sorted((GPU / "kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any(a.arg == "WAITS" for a in node.args.args)
    }


def test_kernels_of_a_decode_step_start_early() -> None:
    names = {name.partition(":")[2] for name in kernels()}

    assert names >= {
        "_norm", "_rope", "rotate_write_kernel", "write_kernel", "attention_kernel",
        "merge_kernel", "_silu_mul", "_quantize", "_matmul", "_add_parts", "_scan", "_choose",
        "_sort", "_product", "_add_up",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in kernels() if not n.startswith("dependent_launch.py")])
def test_wait_is_the_first_statement(name: str) -> None:
    body = kernels()[name].body
    has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)

    assert ast.unparse(body[has_docstring]) == "wait_for_inputs(WAITS)"


def test_only_dependent_launch_sets_the_launch_option() -> None:
    users = [path.name for path in GPU.rglob("*.py") if "launch_pdl" in path.read_text()]

    assert users == ["dependent_launch.py"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (GPUTarget("cuda", 80, 32), {"WAITS": False}),
        (GPUTarget("cuda", 89, 32), {"WAITS": False}),
        (GPUTarget("cuda", 90, 32), {"WAITS": True, "launch_pdl": True}),
        (GPUTarget("cuda", 120, 32), {"WAITS": True, "launch_pdl": True}),
        (GPUTarget("hip", "gfx942", 64), {"WAITS": False}),
    ],
    ids=str,
)
def test_dependent_launches_begin_with_sm_90(target: GPUTarget, expected: dict[str, bool]) -> None:
    assert dependent_launch.options_for(target) == expected


def test_interpreted_kernels_do_not_wait() -> None:
    assert dependent_launch.options() == {"WAITS": False}


def test_planted_faults_are_found_in_compiled_code() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-m", "tests.gpu.dependent_launch_rule", "sm_80", "sm_90"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = dict(line.split(": ", 1) for line in printed.splitlines())

    assert "LDG" in found["sm_90 _loads_first"]
    assert "accesses memory before the wait" in found["sm_90 _loads_first"]
    assert "STG" in found["sm_90 _stores_first"]
    assert "may bypass the wait" in found["sm_90 _leaves_first"]
    assert found["sm_90 _never_waits"] == "0 waits instead of one"
    assert found["sm_90 _waits_first"] == "none"
    assert {line for name, line in found.items() if name.startswith("sm_80")} == {"none"}
