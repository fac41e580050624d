"""Products with quantized weights equal products with the dequantized weights."""

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
def test_quantized_weights_are_dequantized_in_the_product(backend: XlaBackend, format: str) -> None:
    x, bias = numbers(5, 64, seed=2), numbers(24, seed=3)
    weight = round_to(numbers(24, 64), format)
    expected = torch.nn.functional.linear(x, weight.dequantize())

    packed = backend.pack(weight)

    torch.testing.assert_close(backend.linear(x, packed, bias), expected + bias)
    torch.testing.assert_close(backend.logits(x, packed), expected)


def test_pack_quantizes_a_tensor_on_request(backend: XlaBackend) -> None:
    x, weight = numbers(5, 64, seed=2), numbers(24, 64)
    expected = torch.nn.functional.linear(x, round_to(weight, "int4_min").dequantize())

    packed = backend.pack(weight, quantization="int4_min")

    torch.testing.assert_close(backend.linear(x, packed), expected)


def test_an_unsupported_quantization_names_the_reason(backend: XlaBackend) -> None:
    with pytest.raises(BackendError, match="not a multiple"):
        backend.pack(numbers(4, 48), quantization="int8")
