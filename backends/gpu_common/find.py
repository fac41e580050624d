"""Report whether a GPU can be used on this machine, without starting it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from portalm.backend import DeviceReport
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.providers import ATTENTION
from portalm_backends.gpu_common.providers.provider import summary

_INSTALL = "see docs/deploy-gpu.md for how to install one"


def find(
    *, maker: str, has_driver: bool, driver_hint: str, builds: dict[str, str | None], wanted: str
) -> DeviceReport:
    """Report the GPUs of one maker, or the first thing that is missing to use them.

    Args:
        maker: of the GPUs, for messages: NVIDIA or AMD.
        has_driver: the kernel driver is loaded.
        driver_hint: how to fix a missing driver.
        builds: for each platform the version that the installed torch was built for, or None.
        wanted: the platform that is needed, a key of `builds`.
    """
    version = builds[wanted]
    if version is None:
        other = next((name for name, built in builds.items() if built is not None), None)
        kind = "a CPU build" if other is None else f"built for {other}"
        return _missing(
            f"the installed torch {torch.__version__} is {kind}; a {wanted} build is needed "
            f"({_INSTALL})"
        )
    if importlib.util.find_spec("triton") is None:
        return _missing("the package triton is not installed: pip install triton")
    if not has_driver:
        return _missing(f"no {maker} driver is loaded on this machine: {driver_hint}")
    if torch.cuda._is_in_bad_fork():
        return _missing(
            "this process was forked from one that uses the GPU, and a driver does not survive a "
            "fork: start processes with the multiprocessing method spawn"
        )
    count = torch.cuda.device_count()
    if count == 0:
        return _missing(
            f"the {maker} driver reports no GPU to this process: check the visibility settings "
            f"(in a container: that the device is passed in)"
        )
    return DeviceReport(
        is_available=True,
        summary=f"{count} {maker} GPU{'s' if count > 1 else ''}, torch {torch.__version__} "
        f"({wanted} {version})",
        details=(
            (f"{wanted} of torch", version),
            ("attention of long prompts", summary(ATTENTION, CUDA if wanted == "CUDA" else ROCM)),
        ),
    )


def exists(*paths: str) -> bool:
    """True if at least one of the paths exists."""
    return any(Path(path).exists() for path in paths)


def torch_builds() -> dict[str, str | None]:
    """For each platform the version that the installed torch was built for, or None."""
    return {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}


def _missing(summary: str) -> DeviceReport:
    return DeviceReport(is_available=False, summary=summary)
