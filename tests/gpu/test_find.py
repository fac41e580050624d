"""`find` names what is missing and never starts a device."""

from __future__ import annotations

import pytest
import torch

from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.gpu_common.find import find
from portalm_backends.rocm.backend import RocmBackend

CPU_BUILD = {"CUDA": None, "ROCm": None}
CUDA_BUILD = {"CUDA": "13.0", "ROCm": None}


def found(builds: dict[str, str | None], *, wanted: str = "CUDA", has_driver: bool = True) -> str:
    report = find(
        maker="NVIDIA",
        has_driver=has_driver,
        driver_hint="install it",
        builds=builds,
        wanted=wanted,
    )
    assert not report.is_available
    return report.summary


def test_a_cpu_build_of_torch_is_named() -> None:
    assert f"torch {torch.__version__} is a CPU build" in found(CPU_BUILD)


def test_a_build_for_the_other_maker_is_named() -> None:
    assert "built for CUDA; a ROCm build is needed" in found(CUDA_BUILD, wanted="ROCm")


def test_a_missing_driver_is_named() -> None:
    assert "no NVIDIA driver" in found(CUDA_BUILD, has_driver=False)


def test_a_driver_without_a_visible_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    assert "reports no GPU to this process" in found(CUDA_BUILD)


def test_a_process_forked_from_one_that_uses_a_gpu_cannot_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("torch raises here"))

    assert "was forked from one that uses the GPU" in found(CUDA_BUILD)


def test_an_available_gpu_is_found_but_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("it was started"))
    report = find(maker="NVIDIA", has_driver=True, driver_hint="", builds=CUDA_BUILD, wanted="CUDA")

    assert report.is_available
    assert "PortaLM's own kernels" in dict(report.details)["attention of long prompts"]
    assert report.summary.startswith("2 NVIDIA GPUs, torch")


@pytest.mark.parametrize("backend", [CudaBackend, RocmBackend])
def test_the_report_of_this_machine_names_what_is_missing(backend: type[CudaBackend]) -> None:
    report = backend.find()

    assert report.is_available or "torch" in report.summary or "driver" in report.summary
