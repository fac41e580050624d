"""8-bit KV codes and their scales: precision, and the same codes when quantized again."""

from __future__ import annotations

import math

import pytest
import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec
from portalm_backends.portable.kv_codes import bytes_per_block, dequantize, quantize

DTYPES = pytest.mark.parametrize("dtype", SCALED_KV_DTYPES)


def vectors(count: int = 500) -> torch.Tensor:
    """Return [count, 64] with a different magnitude in each vector."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(count, 1, generator=generator) * 60 - 25)
    return torch.randn((count, 64), generator=generator) * sizes


@DTYPES
def test_the_error_is_at_most_half_a_code(dtype: str) -> None:
    x = vectors()

    codes, scales = quantize(x, dtype)

    moved = (dequantize(codes, scales) - x).abs() / scales.float()[:, None]
    # float8 has 4 significant bits and steps of at least 2^-9
    step = 1.0 if dtype == "int8" else (x.abs() / scales[:, None] / 8).clamp(min=2.0**-9)
    assert (moved <= 0.501 * step).all()


@DTYPES
def test_dequantized_values_quantize_to_the_same_codes(dtype: str) -> None:
    codes, scales = quantize(vectors(), dtype)

    again, same_scales = quantize(dequantize(codes, scales), dtype)

    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(same_scales, scales)


@DTYPES
def test_the_largest_number_has_the_largest_code(dtype: str) -> None:
    x = vectors()

    codes, _ = quantize(x, dtype)

    largest = codes.float().abs().amax(dim=-1)
    assert (largest == SCALED_KV_DTYPES[dtype]).all()


@DTYPES
def test_zeros_and_tiny_values_become_zero(dtype: str) -> None:
    codes, scales = quantize(torch.tensor([[0.0, 0.0], [1e-40, -1e-37]]), dtype)

    assert scales.tolist() == [0.0, 0.0]
    assert dequantize(codes, scales).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_with_a_value_that_is_not_finite_becomes_nan(dtype: str, value: float) -> None:
    codes, scales = quantize(torch.tensor([[1.0, value, 3.0], [1.0, 2.0, 3.0]]), dtype)

    assert dequantize(codes, scales).isnan().tolist() == [[True] * 3, [False] * 3]


@DTYPES
def test_bytes_per_block_include_the_scales(dtype: str) -> None:
    spec = KVSpec(num_layers=3, num_kv_heads=2, head_size=64, block_size=16, dtype=dtype)

    assert bytes_per_block(spec) == 3 * 2 * 16 * 2 * (64 + 2)
