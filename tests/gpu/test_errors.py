"""Errors of the device, of torch and of Triton become `BackendError`s that say what to do."""

from __future__ import annotations

import subprocess

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from portalm.errors import BackendError
from portalm_backends.gpu_common.errors import error_kind
from tests.gpu.fake_device import FakeGpu
from tests.gpu.plain import PlainGpu


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), "device_lost"),
        (RuntimeError("HIP error: invalid configuration argument"), "kernel"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "kernel"),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)  # fmt: skip
def test_errors_are_classified_by_their_cause(error: RuntimeError, kind: str | None) -> None:
    assert error_kind(error) == kind


def raise_inside_triton(error: Exception) -> None:
    """Raise `error` in code that counts as a module of Triton."""
    names = {"__name__": "triton.runtime.build", "error": error}
    exec("def fail():\n    raise error\nfail()", names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutOfResources(102656, 101376, "shared memory"), "102656, Hardware limit: 101376.*report"),
        (CompilationError(None, None, "fp8e4nv not supported"), "fp8e4nv not supported.*install"),
        (PTXASError("Value 'sm_200a' is not defined"), "sm_200a.*TRITON_PTXAS_PATH"),
    ],
)  # fmt: skip
def test_exceptions_of_triton_are_device_errors(error: Exception, message: str) -> None:
    backend = PlainGpu(FakeGpu())

    with pytest.raises(BackendError, match=message) as raised, backend.device_errors():
        raise error

    assert raised.value.kind == "kernel" and raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("PassManager::run failed"), "PassManager::run failed; .*report"),
        (RuntimeError("Failed to find C compiler"), "install gcc, or set CC"),
        (subprocess.CalledProcessError(1, ["gcc", "launcher.c"]), "gcc.*install gcc, or set CC"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "check that nvidia-smi"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "set TRITON_CACHE_DIR"),
    ],
)  # fmt: skip
def test_what_triton_raises_with_classes_of_python_is_a_device_error(
    error: Exception, message: str
) -> None:
    backend = PlainGpu(FakeGpu())

    with pytest.raises(BackendError, match=message) as raised, backend.device_errors():
        raise_inside_triton(error)

    assert raised.value.kind == "kernel"


def test_mistakes_of_the_host_stay_what_they_are() -> None:
    backend = PlainGpu(FakeGpu())

    with pytest.raises(PermissionError), backend.device_errors():
        raise PermissionError("elsewhere")
    with pytest.raises(TypeError), backend.device_errors():
        raise_inside_triton(TypeError("missing a required argument: 'table'"))
