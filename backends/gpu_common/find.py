"""Whether a GPU could be used here, told without starting it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from portalm.backend import DeviceReport

_INSTALL = "docs/deploy-gpu.md says how to install one"


def find(
    *, maker: str, has_driver: bool, driver_hint: str, builds: dict[str, str | None], wanted: str
) -> DeviceReport:
    """What is here.

    Args:
        maker: of the GPUs, as people say it.
        has_driver: the kernel's driver is loaded.
        driver_hint: what to do where it is not.
        builds: what the installed torch was built for, by platform: a version, or None.
        wanted: the platform that is needed, a key of `builds`.
    """
    version = builds[wanted]
    if version is None:
        other = next((name for name, built in builds.items() if built is not None), None)
        kind = "a CPU build" if other is None else f"built for {other}"
        return _missing(
            f"the installed torch {torch.__version__} is {kind}: a {wanted} build is needed "
            f"({_INSTALL})"
        )
    if importlib.util.find_spec("triton") is None:
        return _missing("the package triton is missing: pip install triton")
    if not has_driver:
        return _missing(f"there is no {maker} driver on this machine: {driver_hint}")
    count = torch.cuda.device_count()
    if count == 0:
        return _missing(
            f"the {maker} driver shows no GPU to this process: check its visibility (in a "
            f"container: that the device is passed in)"
        )
    return DeviceReport(
        is_available=True,
        summary=f"{count} {maker} GPU{'s' if count > 1 else ''}, torch {torch.__version__} "
        f"({wanted} {version})",
        details=((f"{wanted} of torch", version),),
    )


def exists(*paths: str) -> bool:
    """True if one of these is there."""
    return any(Path(path).exists() for path in paths)


def torch_builds() -> dict[str, str | None]:
    """What the installed torch was built for."""
    return {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}


def _missing(summary: str) -> DeviceReport:
    return DeviceReport(is_available=False, summary=summary)
