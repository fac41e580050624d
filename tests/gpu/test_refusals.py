"""Features that an architecture lacks are refused at startup, with its name and an alternative."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.backend import KVSpec
from portalm.config import EngineConfig
from portalm.errors import Unsupported
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.weights import Fp8Weight
from tests.gpu.fake_device import FakeGpu
from tests.gpu.plain import PlainGpu
from tests.tiny import make_engine

ARCHS = CUDA | ROCM
WITHOUT_FLOAT8 = ("sm_80", "sm_86", "gfx90a", "gfx1100")
"""Ampere, CDNA 2 and RDNA 3 cannot multiply float8."""
KV_DTYPES = set(typing.get_args(typing.get_type_hints(EngineConfig)["kv_cache_dtype"])) - {"auto"}


class AnyGpu(PlainGpu):
    archs = ARCHS
    _pack = GpuBackend._pack


@pytest.fixture(params=ARCHS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AnyGpu:
    """A backend for each architecture, with float8 products only where the hardware has them."""
    name = request.param
    kind = None if name in WITHOUT_FLOAT8 else torch.float8_e4m3fn
    monkeypatch.setattr(fp8, "dtype_of", lambda device: kind)
    return AnyGpu(FakeGpu(arch=name))


def test_unsupported_shapes_are_refused_with_the_name_of_the_gpu(
    tmp_path: Path, backend: AnyGpu
) -> None:
    arch = backend.arch
    where = rf"on {arch.name} \({arch.product}\)"
    with pytest.raises(Unsupported, match=rf"{where}: head size 20 is not supported; .*16, 24"):
        make_engine(tmp_path, backend, hf_overrides={"head_dim": 20})
    with pytest.raises(
        Unsupported, match=rf"{where}: block size 12 is not supported; .*--block-size"
    ):
        make_engine(tmp_path, backend, block_size=12)


def test_8_bit_kv_caches_need_no_float8_support_of_the_device(backend: AnyGpu) -> None:
    assert backend.capabilities.kv_dtypes >= KV_DTYPES


def test_float8_weights_need_float8_products(tmp_path: Path, backend: AnyGpu) -> None:
    where = rf"on {backend.arch.name} .*"
    if fp8.dtype_of(backend.device()) is None:
        with pytest.raises(
            Unsupported, match=rf"{where} fp8 weights; .*--quantization: int8, int4"
        ):
            make_engine(tmp_path, backend, quantization="fp8")
    else:
        packed = backend.pack(torch.ones(16, 32, dtype=torch.bfloat16), quantization="fp8")
        assert isinstance(packed, Fp8Weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_size": 60}, "head size 60 is not supported"),
        ({"block_size": 12}, "block size 12 is not supported"),
        ({"dtype": "float8_e4m3fn"}, "KV dtype float8_e4m3fn is not supported"),
        (
            {"dtype": "int8", "shares_values": True},
            "KV dtype int8 is not supported where values are part of their keys; supported: bfl",
        ),
        (
            {"head_size": 16, "shares_values": True},
            "head size 16 is not supported where values are part of their keys; supported: 32, 48",
        ),
    ],
)
def test_an_unsupported_cache_is_refused(
    backend: AnyGpu, change: dict[str, Any], message: str
) -> None:
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=80, block_size=16, dtype="bfloat16")

    with pytest.raises(Unsupported, match=message):
        backend.kv_alloc(replace(spec, **change), 2)
