"""Codes of 8 bits and their scales: what they stand for, and that it comes to the same again."""

from __future__ import annotations

import math

import pytest
import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec
from portalm_backends.portable.kv_codes import bytes_per_block, dequantize, quantize

DTYPES = pytest.mark.parametrize("dtype", SCALED_KV_DTYPES)


def vectors(count: int = 500) -> torch.Tensor:
    """[count, 64], each of a size of its own."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(count, 1, generator=generator) * 60 - 25)
    return torch.randn((count, 64), generator=generator) * sizes


@DTYPES
def test_no_number_moves_by_more_than_half_a_code(dtype: str) -> None:
    x = vectors()

    codes, scales = quantize(x, dtype)

    moved = (dequantize(codes, scales) - x).abs() / scales.float()[:, None]
    # float8: 4 bits of each number, and 2^-9 at least
    step = 1.0 if dtype == "int8" else (x.abs() / scales[:, None] / 8).clamp(min=2.0**-9)
    assert (moved <= 0.501 * step).all()


@DTYPES
def test_what_codes_stand_for_comes_to_the_same_codes(dtype: str) -> None:
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
def test_zeros_and_what_is_near_them_are_zero(dtype: str) -> None:
    codes, scales = quantize(torch.tensor([[0.0, 0.0], [1e-40, -1e-37]]), dtype)

    assert scales.tolist() == [0.0, 0.0]
    assert dequantize(codes, scales).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_nowhere(dtype: str, value: float) -> None:
    codes, scales = quantize(torch.tensor([[1.0, value, 3.0], [1.0, 2.0, 3.0]]), dtype)

    assert dequantize(codes, scales).isnan().tolist() == [[True] * 3, [False] * 3]


@DTYPES
def test_a_block_counts_its_scales(dtype: str) -> None:
    spec = KVSpec(num_layers=3, num_kv_heads=2, head_size=64, block_size=16, dtype=dtype)

    assert bytes_per_block(spec) == 3 * 2 * 16 * 2 * (64 + 2)
