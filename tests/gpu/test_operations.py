"""Kernels of the layer operations, interpreted: cases of the kit, and views that engines pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portalm.conformance import reference
from portalm.conformance.check import Item
from portalm.conformance.kit import CHECKS
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm.conformance.subject import Subject
from portalm_backends.gpu_common.kernels import norms, rope, silu_mul
from portalm_backends.reference.backend import ReferenceBackend
from tests.gpu.interpreted import InterpretedBackend, complete, some

SUBJECT = Subject(InterpretedBackend())
TORCH = ReferenceBackend()
NAMES = ("linear", "logits", "rms_norm", "layer_norm", "silu_mul", "rope", "moe")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def kit_items() -> list[Item]:
    items = [item for check in CHECKS if check.name in NAMES for item in check.items()]
    return [item for item in items if "bfloat16" not in item.case]


USUAL = ("logits[float16]", "rms_norm[float16]", "layer_norm[float32]", "silu_mul[float32]")


@pytest.mark.parametrize(
    "item", some(kit_items(), lambda item: item.name in USUAL), ids=lambda item: item.name
)
def test_the_kernels_pass_the_conformance_cases(item: Item) -> None:
    result = item.run(SUBJECT)

    assert result.status == "pass", result.message


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Require equal dtypes, finite values and an error within the kit's bound for the dtype."""
    assert actual.dtype == expected.dtype
    name = str(actual.dtype).removeprefix("torch.")
    require_close("", actual.float().numpy(), expected.double().numpy(), NMSE_BOUND[name])


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """Copy `x` into a view of larger memory, with wider rows and an extra row, that is all NaN."""
    wide = torch.full((x.shape[0] + 1, *x.shape[1:-1], x.shape[-1] + 24), float("nan")).to(x.dtype)
    view = wide[: x.shape[0], ..., 8 : 8 + x.shape[-1]]
    view.copy_(x)
    return view


# -- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", some([(1, 576), (3, 33), (37, 16), (2, 4100)], lambda s: s == (3, 33)), ids=str
)
def test_norms_of_rows_that_are_not_contiguous(shape: tuple[int, int], dtype: str) -> None:
    x, residual = (inside_nan(normal(*shape, dtype=dtype, seed=i)) for i in (1, 2))
    weight, bias = (normal(shape[1], dtype=dtype, seed=i) for i in (3, 4))

    close(norms.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    close(norms.layer_norm(x, weight, bias, 1e-5), TORCH.layer_norm(x, weight, bias, 1e-5))
    out, total = norms.add_rms_norm(x, residual, weight, 1e-5)
    expected, summed = TORCH.add_rms_norm(x, residual, weight, 1e-5)
    close(out, expected)
    assert torch.equal(total, summed)


def test_norms_per_head_of_a_merged_projection() -> None:
    merged = normal(5, 8 * 64, dtype="float16")
    weight = normal(64, dtype="float16", seed=1)
    key = merged.view(5, 8, 64)[:, 4:6]

    close(norms.rms_norm(key, weight, 1e-6), TORCH.rms_norm(key, weight, 1e-6))


def test_inputs_without_rows_return_empty_results() -> None:
    weight = normal(8)

    assert norms.rms_norm(torch.empty(0, 8), weight, 1e-6).shape == (0, 8)
    assert silu_mul.silu_mul(torch.empty(0, 8)).shape == (0, 4)


# -- silu_mul, rope ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", some([1, 41, 1024, 1536], lambda w: w == 1536))
def test_silu_mul_of_rows_that_are_not_contiguous(width: int, dtype: str) -> None:
    gate_up = inside_nan(normal(3, 2 * width, dtype=dtype) * 3)
    expected = reference.silu_mul(gate_up.double().numpy())

    close(silu_mul.silu_mul(gate_up), torch.from_numpy(expected).to(DTYPES[dtype]))


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    "sizes", some([(64, 64), (80, 80), (96, 64), (64, 20), (128, 128)], lambda s: s == (96, 64))
)
def test_rope_of_views_into_a_merged_projection(
    sizes: tuple[int, int], is_interleaved: bool
) -> None:
    size, rotary_dim = sizes
    heads, kv_heads = 9, 3
    merged = inside_nan(normal(7, (heads + 2 * kv_heads) * size, dtype="float16"))
    query, key, _ = merged.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    query, key = query.view(7, heads, size), key.view(7, kv_heads, size)
    positions = torch.tensor([0, 3, 2, 63, 1, 1, 40], dtype=torch.int32)
    cos_sin = torch.from_numpy(reference.rope_table(64, rotary_dim, 10_000.0)).float()

    actual = rope.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)

    expected = TORCH.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
        assert torch.equal(one[..., rotary_dim:], other[..., rotary_dim:])


# -- planted faults ---------------------------------------------------------------------------


@complete
def test_the_conformance_kit_detects_wrong_operations() -> None:
    class Wrong(InterpretedBackend):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return super().rms_norm(x, weight, eps * 1000)

        def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> torch.Tensor:
            return super().layer_norm(x, weight, bias * 0.99, eps)

        def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super().silu_mul(torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1))

        def rope(self, query: Any, key: Any, positions: Any, cos_sin: Any, **pairing: Any) -> Any:
            return super().rope(query, key, (positions + 1) % 128, cos_sin, **pairing)

        def moe(self, x: Any, expert_ids: Any, expert_weights: Any, experts: Any) -> torch.Tensor:
            return super().moe(x, expert_ids, expert_weights.flip(-1), experts)

    subject = Subject(Wrong())
    wrong = {"rms_norm", "layer_norm", "silu_mul", "rope", "moe"}
    caught = {
        item.check
        for item in kit_items()
        if item.check in wrong and item.run(subject).status == "fail"
    }

    assert caught == wrong
