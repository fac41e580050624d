"""Unknown architectures are refused or get a safe family; listed ones fit their shared memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from portalm.errors import Unsupported
from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.gpu_common.archs import CUDA, ROCM, find_arch
from portalm_backends.rocm.backend import RocmBackend
from tests.gpu.fake_device import FakeGpu

ROOT = Path(__file__).parents[2]


def test_an_unknown_architecture_is_refused_with_its_name() -> None:
    with pytest.raises(Unsupported, match=r"architecture sm_75 is not supported.*sm_80 \(A100\)"):
        CudaBackend(FakeGpu(arch="sm_75"))
    for name in ("gfx906", "gfx1200", "gfx1300", "sm_90"):
        with pytest.raises(Unsupported, match=rf"architecture {name} is not supported.*gfx942"):
            RocmBackend(FakeGpu(arch=name))


@pytest.mark.parametrize("name", ["sm_87", "sm_130", "sm_200"])
def test_an_unlisted_nvidia_gpu_gets_the_sizes_of_the_least_shared_memory(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        arch = find_arch(name, CUDA)

    assert (arch.name, arch.family) == (name, "ada")
    assert arch.shared_bytes == min(each.shared_bytes for each in CUDA.values())
    assert f"architecture {name} is not listed; using the tile sizes of sm_86" in caplog.text


@pytest.mark.gpu_compiled
@pytest.mark.parametrize("target", [*CUDA, *ROCM])
def test_every_variant_of_attention_fits_the_shared_memory(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.shared_memory", "--targets", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
