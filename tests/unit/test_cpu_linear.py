"""The CPU's linear layers, plain and quantized, against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm_backends.cpu.backend import CpuBackend
from tests.unit import cpu_isas

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NMSE = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 1e-4}
ROUNDED_X = 1e-4
"""NMSE with activations rounded to 8 bits by groups; normal values lose about 3e-5."""
EXACT_X = 3e-8
"""NMSE with activations of 15 bits, which are used with a checkpoint's own codes."""

SHAPES = [(96, 64), (70, 41), (33, 577), (1, 32), (256, 160)]
ROWS = (1, 2, 3, 5, 7, 13, 64, 131)


@pytest.fixture(params=cpu_isas.isas())
def backend(request) -> Iterator[CpuBackend]:
    with cpu_isas.backend_on(request.param) as backend:
        yield backend


def normal(shape, dtype="float32", seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype])


def nmse(actual: torch.Tensor, expected: np.ndarray) -> float:
    difference = actual.double().numpy() - expected
    assert np.isfinite(difference).all()
    return float((difference**2).sum() / (expected**2).sum())


def random_weight(format: str, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    """A weight [n, k] with random codes over their whole range and random scales."""
    rng = np.random.default_rng(seed)
    groups = k // QUANTIZED_FORMATS[format]
    bits = 8 if format.startswith("int8") else 4
    scales = rng.uniform(0.01, 0.3, (n, groups)).astype(np.float16).astype(np.float32)
    minimums = None
    if format.endswith("_min"):
        minimums = -rng.uniform(0.1, 2, (n, groups)).astype(np.float16).astype(np.float32)
        minimums = torch.from_numpy(minimums)
    return QuantizedWeight(
        format=format,
        codes=torch.from_numpy(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)),
        scales=torch.from_numpy(scales),
        zero=0 if minimums is not None else 1 << (bits - 1),
        minimums=minimums,
    )


# -- weights in the model's dtype -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_float64(backend, shape, dtype):
    weight, bias = normal(shape, dtype, 1), normal(shape[:1], dtype, 2)
    packed = backend.pack(weight)
    for rows in ROWS:
        x = normal((rows, shape[1]), dtype, rows)

        actual = backend.linear(x, packed, bias)

        expected = x.double() @ weight.double().T + bias.double()
        assert actual.dtype == x.dtype
        assert nmse(actual, expected.numpy()) < NMSE[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_float32(backend, dtype):
    weight, x = normal((100, 64), dtype, 1), normal((3, 64), dtype, 2)

    actual = backend.logits(x, backend.pack(weight, for_logits=True))

    assert actual.dtype == torch.float32
    assert nmse(actual, (x.double() @ weight.double().T).numpy()) < 1e-11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_float64_and_do_not_depend_on_the_batch(backend, shape):
    weight = normal(shape, "bfloat16", 1)
    packed = backend.pack(weight, for_logits=True)
    together = normal((131, shape[1]), "bfloat16", 2)
    whole = backend.logits(together, packed)
    for rows in ROWS:
        x = together[:rows]

        actual = backend.logits(x, packed)

        assert nmse(actual, (x.double() @ weight.double().T).numpy()) < 1e-11, rows
        assert torch.equal(actual, whole[:rows]), rows


def test_bfloat16_as_integers_loses_less_than_rounding_the_result(backend):
    """docs/adr/0006 predicts a loss of 1e-8; rounding the result to bfloat16 costs 1e-6."""
    weight, x = normal((100, 640), "bfloat16", 1), normal((9, 640), "bfloat16", 2)

    actual = backend.logits(x, backend.pack(weight))

    assert nmse(actual, (x.double() @ weight.double().T).numpy()) < 3e-8


def test_linear_reads_x_inside_wider_rows(backend):
    weight, wide = normal((40, 64), seed=1), normal((5, 200), seed=2)

    actual = backend.linear(wide[:, 30:94], backend.pack(weight))

    assert nmse(actual, (wide[:, 30:94].double() @ weight.double().T).numpy()) < 1e-11


@pytest.mark.parametrize("format", [None, *QUANTIZED_FORMATS])
def test_result_of_a_row_does_not_depend_on_the_batch(backend, format):
    weight, x = normal((70, 96), "bfloat16", 1), normal((200, 96), "bfloat16", 2)
    packed = backend.pack(weight, quantization=format)

    together = backend.linear(x, packed)

    for first, last in ((0, 1), (5, 7), (17, 34), (190, 200)):
        assert torch.equal(backend.linear(x[first:last], packed), together[first:last])


@pytest.mark.parametrize("format", [None, *QUANTIZED_FORMATS])
def test_nan_or_infinity_in_a_row_does_not_affect_other_rows(backend, format):
    weight, x = normal((70, 96), seed=1), normal((9, 96), seed=2)
    packed = backend.pack(weight, quantization=format)
    expected = backend.linear(x, packed)
    x[3, 50], x[6, 0] = float("nan"), float("inf")

    actual = backend.linear(x, packed)

    good = [0, 1, 2, 4, 5, 7, 8]
    assert torch.equal(actual[good], expected[good])
    assert not actual[[3, 6]].isfinite().any()


def test_bfloat16_as_integers_is_exact_if_a_group_spans_few_powers_of_two(backend):
    """Values within 16 times (x) and 32 times (weight) of the group's largest are exact."""
    generator = torch.Generator().manual_seed(1)

    def spread(rows: int, smallest: float) -> torch.Tensor:
        sizes = torch.empty(rows, 128).uniform_(smallest, 1, generator=generator)
        signs = torch.randint(0, 2, (rows, 128), generator=generator) * 2 - 1
        return (sizes * signs).bfloat16()

    weight, x = spread(33, 1 / 31), spread(7, 1 / 15)

    actual = backend.logits(x, backend.pack(weight))

    assert nmse(actual, (x.double() @ weight.double().T).numpy()) < 1e-12


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e35])
def test_bfloat16_weights_of_any_magnitude(backend, size):
    weight, x = normal((33, 128), "bfloat16", 1, size), normal((3, 128), "bfloat16", 2)

    actual = backend.linear(x, backend.pack(weight))

    expected = (x.double() @ weight.double().T).bfloat16().double()
    assert nmse(actual, expected.numpy()) < 1e-4 or size < 1e-30  # denormals may be flushed
    assert actual.isfinite().all()


# -- quantized weights ------------------------------------------------------------------------


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("shape", [(96, 64), (70, 96), (33, 544), (17, 32)], ids=str)
def test_checkpoint_codes_equal_the_dequantized_weight(backend, shape, format):
    weight = random_weight(format, *shape, seed=shape[0])
    packed, exact = backend.pack(weight), weight.dequantize().double()
    for rows in ROWS:
        x = normal((rows, shape[1]), seed=rows)

        actual = backend.linear(x, packed)

        assert nmse(actual, (x.double() @ exact.T).numpy()) < EXACT_X, rows


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_integer_activations_give_exact_results(backend, format):
    """8 bits represent these activations exactly: any error in a code or group is visible."""
    n, k = 70, 96
    weight = random_weight(format, n, k)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (7, k), generator=generator).float()
    x[:, :: QUANTIZED_FORMATS[format]] = 127  # so that each group's scale is 1

    actual = backend.linear(x, backend.pack(weight))

    expected = x.double() @ weight.dequantize().double().T
    assert nmse(actual, expected.numpy()) < 1e-12


@pytest.mark.parametrize(
    ("format", "most"),
    [
        ("int8", 1e-4),
        ("int8_g16", 1e-4),
        ("int8_min", 1e-4),
        ("int8_g16_min", 1e-4),
        ("int4", 1.2e-2),
        ("int4_min", 9e-3),
    ],
)
def test_rounding_error_is_in_the_range_expected_of_its_bits(backend, format, most):
    weight, identity = normal((64, 160), seed=1), torch.eye(160)

    packed = backend.pack(weight, quantization=format)

    error = nmse(backend.linear(identity, packed).T.contiguous(), weight.double().numpy())
    assert most / 50 < error < most


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_rounding_supports_columns_that_do_not_fill_a_group(backend, format):
    weight, x = normal((20, 41), seed=1), normal((3, 41), seed=2)

    actual = backend.linear(x, backend.pack(weight, quantization=format))

    assert nmse(actual, (x.double() @ weight.double().T).numpy()) < 2e-2


def test_rounding_recovers_values_of_a_4_bit_grid(backend):
    grid = random_weight("int4_min", 32, 64)
    x = normal((4, 64), seed=2)

    rounded = backend.pack(grid.dequantize(), quantization="int4_min")

    exact = x.double() @ grid.dequantize().double().T
    assert nmse(backend.linear(x, rounded), exact.numpy()) < 2e-3


def test_a_zero_weight_stays_zero(backend):
    for format in QUANTIZED_FORMATS:
        packed = backend.pack(torch.zeros(20, 64), quantization=format)
        assert (backend.linear(normal((3, 64)), packed) == 0).all()
