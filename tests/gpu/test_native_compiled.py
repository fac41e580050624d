"""The native kernels compiled for each target: their resources and their memory accesses."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import pytest

from tests.gpu import dependent_launch_rule, native_targets
from tests.gpu.native_targets import CLANG, CUDA_TARGETS, NVCC, ROCM_TARGETS

TARGETS = [
    *(pytest.param(t, marks=pytest.mark.skipif(not NVCC, reason="no nvcc")) for t in CUDA_TARGETS),
    *(
        pytest.param(t, marks=pytest.mark.skipif(not CLANG, reason="no clang-19"))
        for t in ROCM_TARGETS
    ),
]

pytestmark = [pytest.mark.gpu_compiled, pytest.mark.parametrize("target", TARGETS)]

compiled = functools.cache(native_targets.compile_for)


@pytest.mark.parametrize("what", ["registers", "shared", "waves"])
def test_resources_are_within_the_committed_budget(target: str, what: str) -> None:
    # after an intended change: python -m tests.gpu.native_targets
    budget = json.loads(native_targets.BUDGETS.read_text())[target]

    actual = {name: dataclasses.asdict(r)[what] for name, r in compiled(target).resources.items()}

    assert set(actual) == set(budget)
    for name, used in actual.items():
        if what == "waves":
            assert used >= budget[name][what], name
        else:
            assert used <= budget[name][what], name


def test_no_kernel_spills_registers(target: str) -> None:
    spilling = {name for name, r in compiled(target).resources.items() if r.spills}

    assert spilling == set()


def test_memory_is_read_and_written_16_bytes_at_a_time(target: str) -> None:
    wide_load, wide_store = (
        (r"LDG\.[\w.]*128", r"STG\.[\w.]*128")
        if target.startswith("sm_")
        else (r"global_load_(b128|dwordx4)", r"global_store_(b128|dwordx4)")
    )
    for name, code in compiled(target).assembly.items():
        assert len(re.findall(wide_load, code)) >= 8, name  # keys and values of 4 tokens in flight
        assert re.search(wide_store, code), name


def test_kernels_wait_for_their_inputs_first(target: str) -> None:
    is_dependent = target in ("sm_90", "sm_100")  # kernels.cu: compute capability 9.0 and newer

    for name, code in compiled(target).assembly.items():
        assert dependent_launch_rule.faults(code, is_dependent=is_dependent) == [], name


def test_cache_is_not_read_through_the_non_coherent_path(target: str) -> None:
    for name, code in compiled(target).assembly.items():
        assert not re.search(r"LDG[\w.]*\.CONSTANT", code), name
