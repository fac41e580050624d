"""Starting a device through torch, whose device API is replaced: no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from portalm_backends.gpu_common.device import TorchGpu


def test_starting_a_gpu_keeps_partial_sums_of_products_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(
        major=9, minor=0, name="H200", multi_processor_count=132, total_memory=141 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True

    gpu = TorchGpu()

    assert gpu.arch == "sm_90"
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
