"""Quantized weights are close to the originals, and exact where they can be."""

from __future__ import annotations

import pytest
import torch

from portalm.backend import QUANTIZED_FORMATS
from portalm_backends.portable.rounding import round_to


@pytest.mark.parametrize("format", sorted(QUANTIZED_FORMATS))
def test_the_error_is_at_most_half_a_code(format: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))

    rounded = round_to(weight, format)

    steps = rounded.scales.abs().repeat_interleave(QUANTIZED_FORMATS[format], dim=1)
    moved = (rounded.dequantize() - weight).abs()
    # int4 without minimums has one code less on one side
    allowed = 1.01 if format == "int4" else 0.51
    assert (moved <= allowed * steps).all()


def test_a_group_of_zeros_stays_zero() -> None:
    for format in QUANTIZED_FORMATS:
        assert (round_to(torch.zeros(2, 32), format).dequantize() == 0).all()


def test_columns_must_be_a_multiple_of_the_group() -> None:
    with pytest.raises(ValueError, match="groups of 32 columns; 48 is not a multiple"):
        round_to(torch.zeros(2, 48), "int8")
