"""CPU backends on every instruction set that this machine can run, emulated ones included.

`_cpu_emulated` is a second native module that only tests use: the code for 16 lanes and for tiles
in plain vectors, so that its logic runs on a CPU without AVX-512. `make emulated` builds it.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import portalm_backends
from portalm_backends.cpu.backend import CpuBackend

_EMULATED = Path(__file__).parents[2] / "build/emulated" / f"_cpu_emulated{EXTENSION_SUFFIXES[0]}"

EMULATED_ISAS = ("emulated_amx", "emulated512") if platform.machine() == "x86_64" else ()
"""Instruction sets of `_cpu_emulated`, which needs AVX2."""


def installed() -> ModuleType:
    """The native module of the installation; tests are skipped without one."""
    return pytest.importorskip("portalm_backends._cpu")


@functools.cache
def emulated() -> ModuleType:
    """The native module `_cpu_emulated`; a test that needs it fails if it was not built."""
    if not _EMULATED.exists():
        pytest.fail(f"{_EMULATED} is missing: `make emulated` builds it")
    spec = importlib.util.spec_from_file_location("portalm_backends._cpu_emulated", _EMULATED)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def isas() -> list[str]:
    """Names of the instruction sets to test on this machine."""
    native = installed().isas()
    return [*native, *(EMULATED_ISAS if "avx2" in native else ())]


@contextmanager
def backend_on(isa: str) -> Iterator[CpuBackend]:
    """A `CpuBackend` with the kernels of `isa`."""
    default = installed().isa()
    native = emulated() if isa in EMULATED_ISAS else installed()
    with mock.patch.object(portalm_backends, "_cpu", native):
        native.set_isa(isa)
        yield CpuBackend()
    installed().set_isa(default)
