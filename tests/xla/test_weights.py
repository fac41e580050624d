"""Products with weights of few bits are those of the values that the codes stand for."""

from __future__ import annotations

import pytest
import torch

from portalm.backend import QUANTIZED_FORMATS
from portalm.errors import BackendError
from portalm_backends.portable.rounding import round_to
from portalm_backends.xla.backend import XlaBackend


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", sorted(QUANTIZED_FORMATS))
def test_codes_are_widened_within_the_product(backend: XlaBackend, format: str) -> None:
    x, bias = numbers(5, 64, seed=2), numbers(24, seed=3)
    weight = round_to(numbers(24, 64), format)
    expected = torch.nn.functional.linear(x, weight.dequantize())

    packed = backend.pack(weight)

    torch.testing.assert_close(backend.linear(x, packed, bias), expected + bias)
    torch.testing.assert_close(backend.logits(x, packed), expected)


def test_a_tensor_is_rounded_where_it_is_asked_for(backend: XlaBackend) -> None:
    x, weight = numbers(5, 64, seed=2), numbers(24, 64)
    expected = torch.nn.functional.linear(x, round_to(weight, "int4_min").dequantize())

    packed = backend.pack(weight, quantization="int4_min")

    torch.testing.assert_close(backend.linear(x, packed), expected)


def test_what_cannot_be_rounded_says_why(backend: XlaBackend) -> None:
    with pytest.raises(BackendError, match="whole groups"):
        backend.pack(numbers(4, 48), quantization="int8")
