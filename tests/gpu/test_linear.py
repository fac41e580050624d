"""Products with quantized and float8 weights, interpreted and compared with float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm.errors import BackendError
from portalm_backends.gpu_common import weights
from portalm_backends.gpu_common.kernels import fp8, linear, matmul, norms, silu_mul
from portalm_backends.portable.rounding import round_to
from tests.gpu.interpreted import InterpretedBackend, complete, some

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
NMSE = {"float32": 1e-11, "float16": 1e-6}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected
    assert difference.isfinite().all()
    return float(difference.square().sum() / expected.square().sum())


def random_weight(format: str, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    """A weight with random codes of the whole range and random scales."""
    rng = np.random.default_rng(seed)
    groups = k // QUANTIZED_FORMATS[format]
    bits = 8 if format.startswith("int8") else 4
    scales = rng.uniform(0.01, 0.3, (n, groups)).astype(np.float16).astype(np.float32)
    minimums = None
    if format.endswith("_min"):
        found = -rng.uniform(0.1, 2, (n, groups)).astype(np.float16).astype(np.float32)
        minimums = torch.from_numpy(found)
    return QuantizedWeight(
        format=format,
        codes=torch.from_numpy(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)),
        scales=torch.from_numpy(scales),
        zero=0 if minimums is not None else 1 << (bits - 1),
        minimums=minimums,
    )


# -- quantized weights ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(DTYPES, lambda dtype: dtype == "float16"))
@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_codes_are_multiplied_exactly(format: str, dtype: str) -> None:
    """The only error is the rounding of the result."""
    weight, bias = random_weight(format, 70, 160), normal(70, dtype=dtype, seed=1)
    packed = weights.pack(weight, CPU)
    for rows in (1, 3, 17):
        x = normal(rows, 160, dtype=dtype, seed=rows)

        actual = linear.linear(x, packed, bias)

        expected = x.double() @ weight.dequantize().double().T + bias.double()
        assert actual.dtype == x.dtype
        assert nmse(actual, expected) < NMSE[dtype] / (1 if dtype == "float32" else 10), rows


@complete
@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_logits_of_quantized_weights_are_float32(format: str) -> None:
    weight, x = random_weight(format, 70, 64), normal(3, 64, dtype="float16")

    actual = linear.logits(x, weights.pack(weight, CPU))

    assert actual.dtype == torch.float32
    assert nmse(actual, x.double() @ weight.dequantize().double().T) < 1e-11


@pytest.mark.parametrize("k", some([32, 1024, 2080], lambda k: k == 1024))
def test_k_is_split_for_few_rows(k: int) -> None:
    weight, bias = random_weight("int4_min", 33, k), normal(33, seed=1)
    x = normal(2, k, seed=2)

    actual = linear.linear(x, weights.pack(weight, CPU), bias)

    assert nmse(actual, x.double() @ weight.dequantize().double().T + bias.double()) < 1e-11


def test_rows_of_x_need_not_be_contiguous() -> None:
    weight, wide = random_weight("int4", 40, 64), torch.full((6, 200), float("nan"))
    wide[:5, 30:94] = normal(5, 64)
    x = wide[:5, 30:94]

    actual = linear.linear(x, weights.pack(weight, CPU))

    assert nmse(actual, x.double() @ weight.dequantize().double().T) < 1e-11


def test_a_row_with_nan_does_not_affect_other_rows() -> None:
    packed, x = weights.pack(random_weight("int8", 40, 64), CPU), normal(9, 64)
    expected = linear.linear(x, packed)
    x[3, 50] = float("nan")

    actual = linear.linear(x, packed)

    others = [i for i in range(9) if i != 3]
    assert torch.equal(actual[others], expected[others])
    assert actual[3].isnan().all()


def test_a_wrong_number_of_columns_is_refused() -> None:
    packed = weights.pack(random_weight("int8", 40, 64), CPU)

    with pytest.raises(BackendError, match=r"linear: x of shape \[2, 32\] .* weight \[40, 64\]"):
        linear.linear(normal(2, 32), packed)


# -- quantizing weights -----------------------------------------------------------------------


@pytest.mark.parametrize("format, bound", [("int8", 3e-5), ("int8_g16", 3e-5), ("int4", 8e-3),
                                           ("int4_min", 7e-3), ("int8_min", 3e-5)])  # fmt: skip
def test_the_quantization_error_matches_the_number_of_bits(format: str, bound: float) -> None:
    weight = normal(64, 96)

    rounded = round_to(weight, format)

    assert nmse(rounded.dequantize(), weight.double()) < bound
    assert rounded.format == format


@complete
@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_a_weight_of_any_width_is_quantized_and_multiplied(format: str) -> None:
    weight, x = normal(20, 41, seed=1), normal(3, 41, seed=2)
    weight[4] = 0.0

    packed = weights.pack(weight, CPU, quantization=format)

    rounded = round_to(
        torch.nn.functional.pad(weight, (0, -41 % QUANTIZED_FORMATS[format])), format
    ).dequantize()[:, :41]
    assert nmse(linear.linear(x, packed), x.double() @ rounded.double().T) < 1e-11


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    weight = random_weight("int4_min", 24, 64)
    weight = replace(weight, scales=weight.scales * 1e-7, minimums=weight.minimums * 1e-7)
    x = normal(2, 64)

    actual = linear.linear(x, weights.pack(weight, CPU))

    assert nmse(actual, x.double() @ weight.dequantize().double().T) < 1e-11


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_packed_weights_have_the_expected_size(format: str) -> None:
    packed = weights.pack(random_weight(format, 64, 512), CPU)

    assert isinstance(packed, weights.PackedQuantized)
    tensors = (packed.codes, packed.scales, packed.minimums)
    num_bytes = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    # minimums of 8-bit codes are float32, because the codes were made signed
    bits = {"int8": 8.5, "int8_g16": 9.0, "int8_min": 9.5, "int8_g16_min": 11.0}
    per_weight = {**bits, "int4": 4.5, "int4_min": 5.0}[format]
    assert num_bytes * 8 == per_weight * 64 * 512


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(BackendError, match="cannot quantize this weight to 'int3'"):
        weights.pack(normal(16, 32), CPU, quantization="int3")


# -- float32 results of 16-bit floats ---------------------------------------------------------


SHAPES = [(5, 301, 96), (1, 64, 64), (33, 70, 1000), (3, 7, 65)]


@pytest.mark.parametrize("shape", some(SHAPES, lambda s: s[0] == 3), ids=str)
def test_products_of_float16_have_float32_results(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, weight = normal(m, k, dtype="float16", seed=1), normal(n, k, dtype="float16", seed=2)

    actual = matmul.matmul(x, weight, None, torch.float32)

    assert nmse(actual, x.double() @ weight.double().T) < 1e-11


# -- float8 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_rows_are_quantized_to_float8_with_their_own_scale(dtype: torch.dtype) -> None:
    x = normal(5, 96, seed=1) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.0])[:, None]

    values, scales = fp8.quantize(x, dtype)

    assert values.dtype == dtype
    back = values.float() * scales
    assert (back[4] == 0).all()
    for row in range(4):
        # the interpreter truncates where devices round, so the error is four times larger
        assert nmse(back[row], x[row].double()) < 6e-3
        assert float(values[row].float().abs().max()) == torch.finfo(dtype).max


QUANTIZING = {
    "rms_norm": lambda x, to: norms.rms_norm(x, x[0], 1e-6, to),
    "add_rms_norm": lambda x, to: norms.add_rms_norm(x, x.flip(0), x[0], 1e-6, to)[0],
    "silu_mul": lambda x, to: silu_mul.silu_mul(torch.cat((x, x.flip(0)), dim=1), to),
}
"""Operations of x [T, C] that also quantize their result, given a float8 dtype."""


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize("name", QUANTIZING)
def test_results_are_quantized_where_they_are_made_to_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (normal(5, 96, seed=1) * torch.tensor([1e-3, 1.0, 5.0, 100.0, 0.0])[:, None]).half()
    plain = QUANTIZING[name](x, None)
    values, scales = fp8.quantize(plain, dtype)
    monkeypatch.setattr(fp8, "_quantize", None)  # a launch would fail

    out = QUANTIZING[name](x, dtype)

    fused_values, fused_scales = fp8.quantize(out, dtype)
    assert out.equal(plain)
    assert fused_values.view(torch.uint8).equal(values.view(torch.uint8))
    assert fused_scales.equal(scales)


def test_attached_codes_are_ignored_after_a_change_in_place_and_for_other_dtypes() -> None:
    x = normal(3, 32).half()
    out = norms.rms_norm(x, x[0], 1e-6, torch.float8_e4m3fn)
    attached, _ = fp8.quantize(out, torch.float8_e4m3fn)
    assert fp8.quantize(out, torch.float8_e4m3fn)[0] is attached

    assert fp8.quantize(out, torch.float8_e4m3fnuz)[0] is not attached
    assert fp8.quantize(out[:2], torch.float8_e4m3fn)[0].shape == (2, 32)
    out[0] = 7.0  # one value in every column

    values, scales = fp8.quantize(out, torch.float8_e4m3fn)
    assert values is not attached
    assert (values[0].float() * scales[0]).allclose(torch.tensor(7.0))


def test_nothing_is_attached_in_inference_mode() -> None:
    with torch.inference_mode():
        x = normal(3, 32).half()
        out = norms.rms_norm(x, x[0], 1e-6, torch.float8_e4m3fn)
        out[0] = 7.0

        values, scales = fp8.quantize(out, torch.float8_e4m3fn)

    assert (values[0].float() * scales[0]).allclose(torch.tensor(7.0))


def test_backend_quantizes_only_inputs_of_float8_weights_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = InterpretedBackend()
    backend.capabilities = replace(
        backend.capabilities, dtypes=backend.capabilities.dtypes | {"bfloat16"}
    )
    packed = backend.pack(normal(32, 64).bfloat16(), quantization="fp8")
    x, other = normal(3, 64).bfloat16(), normal(3, 96).bfloat16()
    expected = backend.linear(backend.rms_norm(x, x[0], 1e-6).clone(), packed)
    monkeypatch.setattr(fp8, "_quantize", None)  # a launch would fail

    actual = backend.linear(backend.rms_norm(x, x[0], 1e-6), packed)
    gated = backend.silu_mul(torch.cat((x, x), dim=1))
    backend.linear(gated, packed)
    backend.linear(backend.add_rms_norm(x, x, x[0], 1e-6)[0], packed)

    assert actual.equal(expected)
    plain = backend.rms_norm(other, other[0], 1e-6)
    with pytest.raises(TypeError):
        fp8.quantize(plain, torch.float8_e4m3fn)


def test_a_float8_weight_has_one_scale_per_row() -> None:
    weight = (normal(32, 48) * torch.logspace(-3, 3, 32)[:, None]).bfloat16()

    packed = weights.pack(weight, CPU, quantization="fp8", fp8=torch.float8_e4m3fn)

    assert isinstance(packed, weights.Fp8Weight)
    back = packed.values.float() * packed.scales.T
    assert max(nmse(b, w.double()) for b, w in zip(back, weight, strict=True)) < 1.5e-3


def test_the_error_of_float8_products_matches_float8() -> None:
    """Torch multiplies float8 with row scales on the CPU, too."""
    assert fp8.dtype_of(CPU) is torch.float8_e4m3fn
    weight, bias = normal(48, 64, seed=1).bfloat16(), normal(48, seed=2).bfloat16()
    x = (normal(5, 64) * torch.tensor([1e-2, 1.0, 10.0, 1.0, 100.0])[:, None]).bfloat16()
    packed = weights.pack(weight, CPU, quantization="fp8", fp8=torch.float8_e4m3fn)

    actual = linear.linear(x, packed, bias)

    expected = x.double() @ weight.double().T + bias.double()
    assert actual.dtype == torch.bfloat16
    for row in range(5):
        assert nmse(actual[row], expected[row]) < 1e-2, row


def test_float8_is_refused_for_unsupported_devices_dtypes_and_shapes() -> None:
    with pytest.raises(BackendError, match="cannot multiply float8"):
        weights.pack(normal(16, 16), CPU, quantization="fp8")
    with pytest.raises(BackendError, match="use --dtype bfloat16"):
        weights.pack(normal(16, 16), CPU, quantization="fp8", fp8=torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="multiples of 16"):
        weights.pack(normal(16, 24).bfloat16(), CPU, quantization="fp8", fp8=torch.float8_e4m3fn)


# -- planted faults ---------------------------------------------------------------------------


@complete
@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_the_comparison_detects_wrong_groups_and_wrong_halves(format: str) -> None:
    weight, x = random_weight(format, 16, 64), normal(2, 64)
    packed = weights.pack(weight, CPU)
    assert isinstance(packed, weights.PackedQuantized)
    expected = x.double() @ weight.dequantize().double().T
    swapped = packed.codes.roll(4, dims=-1) if packed.bits == 8 else (
        (packed.codes << 4) | ((packed.codes >> 4) & 15)
    )  # fmt: skip
    faults = [replace(packed, codes=swapped), replace(packed, scales=packed.scales.flip(0))]
    if packed.minimums is not None:
        faults.append(replace(packed, minimums=packed.minimums.flip(0)))

    for fault in faults:
        assert nmse(linear.linear(x, fault), expected) > 1e-3
