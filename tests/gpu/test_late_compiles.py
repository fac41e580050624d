"""Kernels compiled while serving are counted, and logged once each."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from triton import knobs

from portalm_backends.gpu_common.late_compiles import LateCompiles


def compile_kernel(name: str) -> None:
    """Do what Triton's JIT does after it compiled a kernel."""
    hook = knobs.runtime.jit_post_compile_hook
    if hook is not None:
        hook(key="", repr=f"{name}[num_warps=4]", fn=SimpleNamespace(name=name), compile={})


def test_compilations_are_counted_while_sealed(caplog: pytest.LogCaptureFixture) -> None:
    late, seen = LateCompiles(), []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **about: seen.append(about["fn"].name)
        compile_kernel("at_startup")
        with caplog.at_level(logging.WARNING), late.counted():
            for name in ("merge", "merge", "rope"):
                compile_kernel(name)
        compile_kernel("afterwards")

    assert late.kernels == {"merge": 2, "rope": 1}
    assert seen == ["at_startup", "merge", "merge", "rope", "afterwards"]  # other hooks still run
    assert [r.args[0] for r in caplog.records] == ["merge", "rope"]  # type: ignore[index]
