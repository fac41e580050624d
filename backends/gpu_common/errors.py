"""Translate the exceptions of torch, Triton and the driver to `BackendError`."""

from __future__ import annotations

import subprocess
from types import TracebackType

import torch

from portalm.errors import BackendError, BackendErrorKind

_LOST = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "uncorrectable ECC",
    "hardware",
    "memory access fault",
    "device is lost",
)
"""Texts of runtime errors after which this process cannot use the device again."""

_DEVICE_ERRORS = (
    "CUDA error",
    "HIP error",
    "CUBLAS",
    "HIPBLAS",
    "CUDA driver error",
    "Triton Error",
)
"""Substrings of error messages that come from the layers below torch."""

_ADVICE = {
    "OutOfResources": "a tile size of PortaLM does not fit this GPU; please report this with the "
    "output of `portalm devices`",
    "PTXASError": "the assembler of the installed Triton may be too old for this GPU: install a "
    "newer Triton, or set TRITON_PTXAS_PATH to the ptxas of a CUDA toolkit that supports the GPU",
    "CompilationError": "the installed Triton may not support this GPU: install the release that "
    "the installed torch requires",
    "compiler": "Triton needs a C compiler to build its launchers: install gcc, or set CC",
    "driver": "Triton finds no driver, or several: check that nvidia-smi or rocm-smi lists the "
    "GPU, and hide other makers' GPUs",
    "cache": "Triton needs a folder for compiled kernels: set TRITON_CACHE_DIR to one that is "
    "writable and has free space",
    "": "the installed Triton may not support this GPU or this machine; please report this with "
    "the output of `portalm devices`",
}
"""What to do about an error of Triton: by the name of its class, or by `_cause_of` of its text."""


def backend_error(error: Exception) -> BackendError | None:
    """Translate an exception; None if neither the device nor Triton caused it."""
    if isinstance(error, RuntimeError):
        kind = error_kind(error)
        if kind is not None:
            return BackendError(kind, str(error))
    if not _is_of_triton(error):
        return None
    names = [base.__name__ for base in type(error).__mro__]
    known = [name for name in names if name in _ADVICE]
    advice = _ADVICE[known[0] if known else _cause_of(error)]
    text = str(error).strip() or type(error).__name__
    return BackendError(
        "kernel", f"Triton could not compile or load a GPU kernel: {text}; {advice}"
    )


def error_kind(error: RuntimeError) -> BackendErrorKind | None:
    """Classify an error of the device; None if the device did not cause it."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return "oom"
    if isinstance(error, torch.AcceleratorError) or any(name in text for name in _DEVICE_ERRORS):
        return "device_lost" if any(reason in text for reason in _LOST) else "kernel"
    return None


def _is_of_triton(error: Exception) -> bool:
    """True for Triton's own exceptions, and for what its compiler and launcher raise.

    Other types of exceptions that pass through Triton (TypeError, for example) are mistakes in a
    call, and stay what they are.
    """
    if any(base.__module__.partition(".")[0] == "triton" for base in type(error).__mro__):
        return True
    if not isinstance(error, (RuntimeError, OSError, subprocess.SubprocessError)):
        return False
    return any(name.partition(".")[0] == "triton" for name in _modules(error.__traceback__))


def _modules(traceback: TracebackType | None) -> list[str]:
    """Names of the modules that an exception passed through, the one that raised it last."""
    names = []
    while traceback is not None:
        names.append(str(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next
    return names


def _cause_of(error: Exception) -> str:
    """The key of `_ADVICE` for an error that Triton raises with a class of Python's."""
    text = str(error)
    if "compiler" in text or isinstance(error, subprocess.SubprocessError):
        return "compiler"
    if "active drivers" in text:
        return "driver"
    return "cache" if isinstance(error, OSError) or "cache dir" in text else ""
