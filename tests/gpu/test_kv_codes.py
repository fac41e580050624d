"""8-bit keys and values in the attention kernel: decoding, range of scales and queries, splits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from portalm.conformance import reference
from portalm.conformance.numerics import NMSE_BOUND, nmse
from portalm_backends.gpu_common import attention
from portalm_backends.gpu_common.cache import ScaledKV
from portalm_backends.gpu_common.kernels import kv_codes as kernels
from portalm_backends.gpu_common.kernels.kv_codes import FP8, INT8, PORTABLE, PTX, PTX_FP8
from portalm_backends.portable import kv_codes
from tests.gpu.interpreted import complete
from tests.gpu.test_attention import ALONE, BLOCK, CROWD, EVERYTHING, SINKS, SPEC, Step

CODES = {"int8": INT8, "fp8": FP8}
ALL = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int8)
"""Every code, with the two NaNs of float8, which are never written."""


def exact(dtype: str) -> torch.Tensor:
    """Values of all codes as `kv_codes.dequantize` defines them: float32 [256]."""
    return kv_codes.dequantize(ALL.view(kv_codes.CODE_DTYPES[dtype]), torch.ones(()))


# -- decoding ---------------------------------------------------------------------------------


@triton.jit
def decode_kernel(codes, out, CODES: tl.constexpr):
    index = tl.arange(0, 256)
    values = kernels.decode(tl.load(codes + index), out.dtype.element_ty, CODES, 0)
    tl.store(out + index, values)


@pytest.mark.parametrize("out", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", CODES)
def test_decoding_is_exact(dtype: str, out: torch.dtype) -> None:
    result = torch.empty(256, dtype=out)

    decode_kernel[(1,)](ALL, result, CODES[dtype])

    triton_dtype = tl.float16 if out == torch.float16 else tl.float32
    values = result.float() * kernels.divisor(triton_dtype, CODES[dtype], PORTABLE)
    expected = exact(dtype)
    is_number = ~expected.isnan()
    assert torch.equal(values[is_number], expected[is_number])


def emulate(ptx: str, codes: torch.Tensor) -> torch.Tensor:
    """Run PTX that converts four codes, int8 [4 N], to float16 [4 N]."""
    words = codes.numpy().view(np.uint32)
    registers: dict[str, Any] = {"$2": words}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def halves(word: Any) -> Any:
        return np.ascontiguousarray(np.broadcast_to(word, words.shape)).view(np.float16)

    def permuted(low: Any, high: Any, selector: Any) -> Any:
        both = np.broadcast_to(low, words.shape).astype(np.uint64)
        both = both | (np.broadcast_to(high, words.shape).astype(np.uint64) << np.uint64(32))
        out = np.zeros(words.shape, np.uint32)
        for byte in range(4):
            index = int(selector) >> (4 * byte) & 0xF
            assert index < 8, "sign replication is not used"
            picked = (both >> np.uint64(8 * index)) & np.uint64(0xFF)
            out |= picked.astype(np.uint32) << np.uint32(8 * byte)
        return out

    def converted(pair: Any) -> Any:
        both = torch.from_numpy(np.ascontiguousarray(pair)).view(torch.float8_e4m3fn)
        return both.to(torch.float16).numpy().view(np.uint32)

    operations = {
        "xor.b32": lambda a, b: a ^ b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "mov.b32": lambda a: a,
        "prmt.b32": permuted,
        "sub.f16x2": lambda a, b: (halves(a) - halves(b)).view(np.uint32),
        "cvt.rn.f16x2.e4m3x2": converted,
    }
    for statement in re.sub(r"\{\s*\.reg", ".reg", ptx).rstrip("} \n").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        pair = re.match(r"\{(\w+), (\w+)\}, (\$2)", rest)
        if pair:  # a register as two halves
            registers[pair[1]], registers[pair[2]] = words.view(np.uint16).reshape(-1, 2).T
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        registers[target] = operations[name](*map(value, operands))
    out = np.stack([registers["$0"], registers["$1"]], 1)
    return torch.from_numpy(out.view(np.float16).reshape(-1).copy())


@pytest.mark.parametrize(
    ("dtype", "decoder"), [("int8", PTX), ("fp8", PTX), ("fp8", PTX_FP8)], ids=str
)
def test_the_ptx_of_nvidia_gpus_is_exact(dtype: str, decoder: int) -> None:
    asm = kernels._PTX_OF_INT8 if dtype == "int8" else kernels._PTX_OF_FP8.value[decoder - 1]

    values = emulate(getattr(asm, "value", asm), ALL).float()

    values = values * kernels.divisor(tl.float16, CODES[dtype], decoder)
    expected = exact(dtype)
    is_number = ~expected.isnan()
    assert torch.equal(values[is_number], expected[is_number])


# -- attention --------------------------------------------------------------------------------


class ScaledStep(Step):
    """A step over an 8-bit cache; keys and values of each token have their own magnitude."""

    def __init__(self, dtype: str, *args: Any, magnitudes: tuple[int, int] = (0, 1)) -> None:
        """Multiply the values of each token by a power of 2 in the range `magnitudes`."""
        super().__init__(*args)
        generator = torch.Generator().manual_seed(1)
        powers = torch.randint(*magnitudes, (*self.cache.shape[:2], BLOCK, 1), generator=generator)
        self.cache[:, :, 1] *= 2.0**powers
        codes, scales = kv_codes.quantize(self.cache, dtype)
        self.scaled = ScaledKV(dtype, codes.view(torch.int8), scales)
        stored = kv_codes.dequantize(codes, scales)  # [NB, 1, 2, BLOCK, 16]
        for i, length in enumerate(self.meta.host_seq_lens[: len(self.query_lens)]):
            own = stored[self.meta.block_table[i].long()]
            pair = own.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
            self.key[i], self.value[i] = pair

    def attend_scaled(self, spec: Any, plan: Any, query: torch.Tensor) -> torch.Tensor:
        sinks = SINKS if spec.has_sinks else None
        return attention.attend(self.scaled, query, self.meta, spec, plan, sinks)

    def expected_of(self, spec: Any, query: torch.Tensor) -> Any:
        sinks = SINKS.double().numpy() if spec.has_sinks else None
        queries = query.double().split(self.query_lens)
        return np.concatenate(
            [
                reference.attention(q.numpy(), k.double().numpy(), v.double().numpy(), spec, sinks)
                for q, k, v in zip(queries, self.key, self.value, strict=True)
            ]
        )


@pytest.mark.parametrize("spec", [SPEC, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", CODES)
def test_attention_matches_the_reference(dtype: str, query_dtype: torch.dtype, spec: Any) -> None:
    step = ScaledStep(dtype, [1, 20], [300, 45])
    query = step.query.to(query_dtype)

    actual = step.attend_scaled(spec, step.plan(spec, CROWD), query)

    expected = step.expected_of(spec, query)
    bound = NMSE_BOUND[str(query_dtype).removeprefix("torch.")]
    assert nmse(actual.float().numpy(), expected) < bound


@pytest.mark.parametrize("magnitudes", [(-60, -40), (40, 60), (-12, 12)], ids=str)
@pytest.mark.parametrize("dtype", CODES)
def test_values_may_be_outside_of_the_range_of_float16(
    dtype: str, magnitudes: tuple[int, int]
) -> None:
    step = ScaledStep(dtype, [1, 20], [300, 45], magnitudes=magnitudes)
    query = step.query.bfloat16()

    actual = step.attend_scaled(SPEC, step.plan(SPEC, CROWD), query)

    assert nmse(actual.float().numpy(), step.expected_of(SPEC, query)) < NMSE_BOUND["bfloat16"]


@pytest.mark.parametrize("power", [-100, -20, 20, 60])
def test_queries_may_be_outside_of_the_range_of_float16(power: int) -> None:
    """Keys of the inverse magnitude keep the scores what they are."""
    plain, other = (ScaledStep("fp8", [1, 20], [70, 45]) for _ in range(2))
    other.scaled.scales[:, :, 0] *= 2.0**-power  # of keys
    plan = plain.plan(SPEC, CROWD)

    actual = other.attend_scaled(SPEC, plan, (other.query * 2.0**power).bfloat16())

    expected = plain.attend_scaled(SPEC, plan, plain.query.bfloat16())
    assert torch.equal(actual[:21], expected[:21])


def test_a_value_of_zeros_counts_in_the_sum_of_weights() -> None:
    step = ScaledStep("int8", [1], [40])
    block = step.meta.block_table[0, 1]
    step.scaled.scales[block, :, 1] = 0.0
    step.scaled.codes[block, :, 1] = 0
    step.value[0][BLOCK : 2 * BLOCK] = 0.0
    query = step.query.bfloat16()

    actual = step.attend_scaled(SPEC, step.plan(SPEC, CROWD), query)

    assert nmse(actual.float().numpy(), step.expected_of(SPEC, query)) < NMSE_BOUND["bfloat16"]


@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_scale_of_nan_shows_in_its_request_alone(side: int, query_dtype: torch.dtype) -> None:
    step = ScaledStep("fp8", [1, 1], [40, 40])
    step.scaled.scales[step.meta.block_table[0, 1], :, side, 3] = float("nan")

    actual = step.attend_scaled(SPEC, step.plan(SPEC, CROWD), step.query.to(query_dtype))

    assert actual[0].isnan().all() and actual[1].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "query_dtype"),
    [
        ("fp8", torch.bfloat16),
        pytest.param("int8", torch.bfloat16, marks=complete),
        pytest.param("int8", torch.float32, marks=complete),
    ],
    ids=str,
)  # fmt: skip
def test_a_split_decode_is_bit_identical_to_a_whole_one(
    dtype: str, query_dtype: torch.dtype
) -> None:
    step = ScaledStep(dtype, [1, 3], [600, 513], magnitudes=(-8, 8))
    query = step.query.to(query_dtype)
    split, whole = step.plan(EVERYTHING, ALONE), step.plan(EVERYTHING, CROWD)
    assert split.narrow is not None and len(split.narrow.merges) == 2

    actual = step.attend_scaled(EVERYTHING, split, query)

    assert torch.equal(actual, step.attend_scaled(EVERYTHING, whole, query))
