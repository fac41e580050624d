"""Experts, interpreted on a device whose unwritten memory is NaN, compared with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import QUANTIZED_FORMATS, Experts
from portalm.conformance import reference
from portalm.conformance.numerics import NMSE_BOUND
from portalm.engine.engine import Engine
from portalm_backends.gpu_common import weights
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.kernels import fp8, moe
from portalm_backends.gpu_common.weights import Fp8Weight, GpuWeight, PackedQuantized
from portalm_backends.reference.backend import ReferenceBackend
from tests.gpu.fake_device import FakeGpu
from tests.gpu.interpreted import complete, interpreted, interpreted_backend, some
from tests.gpu.plain import PlainGpu
from tests.gpu.test_linear import DTYPES, nmse, normal, random_weight
from tests.tiny import ask, make_engine, run, tokens

CPU = torch.device("cpu")
HIDDEN, INNER = 48, 40


def random_experts(
    count: int, dtype: str = "float32", *, hidden: int = HIDDEN, inner: int = INNER
) -> Experts:
    gate_up = normal(count, 2 * inner, hidden, seed=1) * hidden**-0.5
    down = normal(count, hidden, inner, seed=2) * inner**-0.5
    return Experts(
        gate_up=tuple(gate_up.to(DTYPES[dtype]).unbind()),
        down=tuple(down.to(DTYPES[dtype]).unbind()),
    )


def random_choice(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    rng = np.random.default_rng(num_tokens)
    rows = [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]
    return torch.tensor(np.array(rows, np.int32).reshape(num_tokens, top_k))


def random_shares(ids: torch.Tensor) -> torch.Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) + 0.1


def on_gpu(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: Experts,
           arch: str = "sm_90") -> torch.Tensor:  # fmt: skip
    """Result of the backend on a simulated device with late streams."""
    gpu = FakeGpu(arch=arch)
    backend = interpreted_backend(gpu)
    with interpreted(gpu):
        out = backend.moe(x, ids, shares, experts)
        gpu.synchronize()
    return out


def expected(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: Experts
) -> torch.Tensor:
    def wide(matrices: Sequence[Any]) -> list[Any]:
        return [matrix.double().numpy() for matrix in matrices]

    biases = None
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        biases = experts.gate_up_bias.double().numpy(), experts.down_bias.double().numpy()
    out = reference.moe(
        x.double().numpy(), ids.numpy(), shares.double().numpy(), wide(experts.gate_up),
        wide(experts.down), biases, experts.swiglu_limit, experts.swiglu_alpha,
    )  # fmt: skip
    return torch.from_numpy(out)


def check(
    ids: torch.Tensor, experts: Experts, dtype: str = "float32", shares: Any = None
) -> torch.Tensor:
    x = normal(len(ids), experts.gate_up[0].shape[1], dtype=dtype, seed=4)
    shares = random_shares(ids) if shares is None else shares
    out = on_gpu(x, ids, shares, experts)
    assert out.dtype == x.dtype
    assert nmse(out, expected(x, ids, shares, experts)) < NMSE_BOUND[dtype]
    return out


# -- which experts ----------------------------------------------------------------------------

CHOICES = {
    "one token": [[3, 0]],
    "one expert for all": [[2]] * 19,
    "one expert for all, another for each": [[2, i % 2] for i in range(17)],
    "the last expert alone": [[4]],
    "every expert of every token": [[0, 1, 2, 3, 4]] * 3,
}


@pytest.mark.parametrize("choice", some(CHOICES, lambda name: "every" not in name))
def test_any_choice_of_experts_matches_the_reference(choice: str) -> None:
    check(torch.tensor(CHOICES[choice], dtype=torch.int32), random_experts(5))


def test_more_tiles_than_one_band_match_the_reference() -> None:
    check(random_choice(61, 2, 10), random_experts(10, hidden=72, inner=70))


def test_results_are_the_same_on_several_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, experts = random_choice(61, 2, 10), random_experts(10, hidden=72, inner=70)
    x, shares = normal(61, 72, seed=4), random_shares(ids)
    one = on_gpu(x, ids, shares, experts, arch="gfx942")

    monkeypatch.setattr(FakeGpu, "num_cores", 304)  # 8 dies: programs are renumbered
    eight = on_gpu(x, ids, shares, experts, arch="gfx942")

    assert torch.equal(eight, one)
    assert nmse(eight, expected(x, ids, shares, experts)) < NMSE_BOUND["float32"]


ROWS = {32: 16, 33: 64, 128: 64, 129: 128, 301: 128}


@pytest.mark.parametrize("num_tokens", some(ROWS, lambda n: n == 129))
def test_tiles_grow_with_the_tokens_per_expert(num_tokens: int) -> None:
    ids = random_choice(num_tokens, 1, 2)

    assert moe.tile_rows(ids.numel(), 2) == ROWS[num_tokens]
    check(ids, random_experts(2))


def test_a_step_without_tokens_returns_an_empty_result() -> None:
    ids = torch.empty(0, 2, dtype=torch.int32)

    assert on_gpu(torch.empty(0, HIDDEN), ids, ids.float(), random_experts(3)).shape == (0, HIDDEN)


@pytest.mark.parametrize("num_tokens", some([1, 7, 700], lambda n: n == 700))
def test_every_choice_is_in_one_tile_of_its_expert(num_tokens: int) -> None:
    """With more choices than a program reads at a time, and experts without tokens."""
    ids = random_choice(num_tokens, 8, 20) * 2
    gpu = FakeGpu()
    with interpreted(gpu):
        tiles = moe.sort(ids, 40)
        gpu.synchronize()

    count = int(tiles.count)
    least = sum(-(-n // tiles.rows) for n in ids.flatten().bincount().tolist())
    assert count == least <= len(tiles.experts)
    found = tiles.choices[:count]
    assert found[found < tiles.num_choices].sort().values.tolist() == list(range(num_tokens * 8))
    assert (found[found >= tiles.num_choices] == tiles.num_choices).all()
    for tile, expert in zip(found, tiles.experts.tolist(), strict=False):
        own = tile[tile < tiles.num_choices]
        assert len(own) and (ids.flatten()[own] == expert).all()
        assert own.tolist() == sorted(own.tolist())


# -- numerics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(DTYPES, lambda dtype: dtype == "float16"))
@pytest.mark.parametrize("num_tokens", some([9, 90], lambda n: n == 9))
def test_biases_and_clamped_gates_match_the_reference(dtype: str, num_tokens: int) -> None:
    experts = replace(
        random_experts(4, dtype),
        gate_up_bias=normal(4, 2 * INNER, dtype=dtype, seed=5) * 2,
        down_bias=normal(4, HIDDEN, dtype=dtype, seed=6),
        swiglu_limit=1.25,
        swiglu_alpha=1.7,
    )

    check(random_choice(num_tokens, 2, 4), experts, dtype)


def test_a_down_bias_needs_no_gate_up_bias() -> None:
    ids, bias = random_choice(5, 2, 4), normal(4, HIDDEN, seed=6)
    experts = random_experts(4)
    none = torch.zeros(4, 2 * INNER)
    x, shares = normal(5, HIDDEN), random_shares(ids)

    actual = on_gpu(x, ids, shares, replace(experts, down_bias=bias))

    both = replace(experts, gate_up_bias=none, down_bias=bias)
    assert nmse(actual, expected(x, ids, shares, both)) < 1e-11


def test_weights_of_experts_that_are_not_chosen_have_no_effect() -> None:
    experts = random_experts(5, "float16")
    experts.gate_up[3].fill_(6e4)
    experts.down[1].fill_(float("nan"))

    check(torch.tensor([[0, 2], [4, 2], [2, 4]], dtype=torch.int32), experts, "float16")


def test_an_expert_with_weight_zero_may_overflow() -> None:
    experts = random_experts(3, "float16")
    experts.down[1].fill_(6e4)
    ids = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    shares = torch.tensor([[0.7, 0.0], [0.2, 0.0]])

    check(ids, experts, "float16", shares)


def test_a_token_with_nan_does_not_affect_other_tokens() -> None:
    ids, experts = random_choice(20, 2, 3), random_experts(3)
    experts = replace(experts, swiglu_limit=1.0)
    x, shares = normal(20, HIDDEN), random_shares(ids)
    before = on_gpu(x, ids, shares, experts)
    x[7, 11] = float("nan")

    after = on_gpu(x, ids, shares, experts)

    others = [i for i in range(20) if i != 7]
    assert torch.equal(after[others], before[others])
    assert after[7].isnan().all()


def test_rows_of_x_need_not_be_contiguous() -> None:
    ids, experts = random_choice(6, 2, 3), random_experts(3)
    wide = torch.full((7, HIDDEN + 30), float("nan"))
    x = wide[:6, 10 : 10 + HIDDEN]
    x.copy_(normal(6, HIDDEN))
    shares = random_shares(ids)

    actual = on_gpu(x, ids, shares, experts)

    assert nmse(actual, expected(x.contiguous(), ids, shares, experts)) < 1e-11


# -- packed weights ---------------------------------------------------------------------------


def quantized_experts(
    format: str, count: int, inner: int = 64, hidden: int = 96
) -> tuple[Experts, Experts]:
    """Quantized experts in the layout of the kernels, and the same dequantized."""
    given = [
        [random_weight(format, *shape, seed=10 * i + shape[0]) for i in range(count)]
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    packed = [tuple(weights.pack(w, CPU) for w in many) for many in given]
    plain = [tuple(w.dequantize() for w in many) for many in given]
    return Experts(gate_up=packed[0], down=packed[1]), Experts(gate_up=plain[0], down=plain[1])


@pytest.mark.parametrize("num_tokens", some([5, 120], lambda n: n == 5))
@pytest.mark.parametrize("format", some(QUANTIZED_FORMATS, lambda f: f == "int4_min"))
def test_codes_are_multiplied_exactly(format: str, num_tokens: int) -> None:
    packed, plain = quantized_experts(format, 4)
    ids = random_choice(num_tokens, 2, 4)
    x, shares = normal(num_tokens, 96) * 0.02, random_shares(ids)

    actual = on_gpu(x, ids, shares, packed)

    assert nmse(actual, expected(x, ids, shares, plain)) < 1e-10


def test_float16_scales_become_float32_if_another_expert_needs_it() -> None:
    packed, plain = quantized_experts("int4_min", 3)
    one = packed.gate_up[1]
    assert isinstance(one, PackedQuantized)
    one.scales, one.minimums = one.scales.float() * 1.0001, one.minimums
    plain.gate_up[1].copy_(dequantized(one))
    ids = random_choice(5, 2, 3)
    x, shares = normal(5, 96) * 0.02, random_shares(ids)

    actual = on_gpu(x, ids, shares, packed)

    assert {w.scales.dtype for w in packed.gate_up} == {torch.float32}
    assert {w.scales.dtype for w in packed.down} == {torch.float16}
    assert nmse(actual, expected(x, ids, shares, plain)) < 1e-10


def dequantized(weight: PackedQuantized) -> torch.Tensor:
    """Values [N, K] of an int4_min weight."""
    codes = torch.stack([weight.codes & 15, (weight.codes >> 4) & 15], dim=-1).flatten(2)
    assert weight.minimums is not None
    wide = codes.float() * weight.scales.float()[..., None] + weight.minimums.float()[..., None]
    return wide.transpose(0, 1).flatten(1)


def test_float8_products_are_exact_after_quantization() -> None:
    given = [normal(32, 64, seed=i).bfloat16() for i in range(3)]
    packed = [weights.pack(w, CPU, quantization="fp8", fp8=torch.float8_e4m3fn) for w in given]
    ids, x = random_choice(7, 2, 3), normal(7, 64, dtype="float16", seed=9)
    gpu = FakeGpu()
    with interpreted(gpu):
        grouped = weights.group_experts(packed, interpreted_backend(gpu).to_device)
        assert grouped is not None
        actual = moe.product(x, grouped, moe.sort(ids, 3), None, top_k=2)
        codes, scales = fp8.quantize(x, torch.float8_e4m3fn)
        gpu.synchronize()

    rounded = codes.double() * scales.double()
    for choice, expert in enumerate(ids.flatten().tolist()):
        weight = packed[expert]
        assert isinstance(weight, Fp8Weight)
        right = rounded[choice // 2] @ (weight.values.double() * weight.scales.T.double()).T
        assert nmse(actual[choice], right) < 1e-6


@complete
def test_the_error_of_float8_experts_matches_float8() -> None:
    plain = random_experts(3, hidden=64, inner=32)

    def packed(matrices: Sequence[Any]) -> tuple[GpuWeight, ...]:
        return tuple(
            weights.pack(w.bfloat16(), CPU, quantization="fp8", fp8=torch.float8_e4m3fn)
            for w in matrices
        )

    ids = random_choice(9, 2, 3)
    x, shares = normal(9, 64, dtype="float16"), random_shares(ids)

    actual = on_gpu(x, ids, shares, Experts(gate_up=packed(plain.gate_up), down=packed(plain.down)))

    # two products, each after a quantization that the interpreter truncates instead of rounding
    assert nmse(actual, expected(x, ids, shares, plain)) < 2e-2


def test_experts_of_different_formats_are_computed_one_by_one_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = random_experts(3, hidden=64, inner=32)
    first = weights.pack(plain.gate_up[0], CPU, quantization="int8")
    experts = replace(plain, gate_up=(first, *plain.gate_up[1:]))
    ids = random_choice(5, 2, 3)
    x, shares = normal(5, 64), random_shares(ids)

    actual = on_gpu(x, ids, shares, experts)

    assert "experts of a layer differ in format" in caplog.text
    assert nmse(actual, expected(x, ids, shares, plain)) < 1e-3


def test_weights_need_not_be_aligned_to_16_bytes() -> None:
    experts = random_experts(3, "float16")
    memory = torch.empty(3, 2 * INNER * HIDDEN + 1, dtype=torch.float16)
    moved = memory[:, 1:].view(3, 2 * INNER, HIDDEN)
    moved.copy_(torch.stack(experts.gate_up))
    experts = replace(experts, gate_up=tuple(moved.unbind()))
    grouped = weights.group_experts(experts.gate_up, torch.from_numpy)

    assert grouped is not None and grouped.alignment == 1
    check(random_choice(5, 2, 3), experts, "float16")


# -- a model ----------------------------------------------------------------------------------

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
}


class PlainExceptExperts(PlainGpu):
    """Interprets the kernels of experts only; everything else is fast plain torch."""

    moe = GpuBackend.moe


def sampled(engine: Engine) -> dict[str, list[int]]:
    for i, prompt in enumerate([[5, 6, 7], [9] * 17]):
        ask(engine, str(i), prompt, max_tokens=5)
    return tokens(run(engine))


def test_captured_decodes_sample_the_reference_tokens(tmp_path: Path) -> None:
    settings = {
        "hf_overrides": MIXTRAL,
        "num_gpu_blocks_override": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
    }
    gpu = FakeGpu(seed=1)
    with interpreted(gpu):
        engine = make_engine(tmp_path / "gpu", PlainExceptExperts(gpu), **settings)
        while engine.capture_next():
            pass
        gpu.num_replays = 0
        on_gpu = sampled(engine)

    assert gpu.num_replays >= 4
    assert on_gpu == sampled(make_engine(tmp_path / "reference", ReferenceBackend(), **settings))
