"""The sampling kernels, interpreted, compared with plain Python and with the torch default."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from portalm.backend import LogitBias
from portalm.conformance import reference_sampling
from portalm.conformance.check import Item
from portalm.conformance.operations import CHECKS, run_sample, sample_params
from portalm.conformance.reference_sampling import Row
from portalm.conformance.subject import Subject
from portalm_backends.gpu_common.kernels import adjust, gumbel, logprobs, ordering, sampling
from portalm_backends.portable import philox
from portalm_backends.portable import sampling as portable
from portalm_backends.reference.backend import ReferenceBackend
from tests.gpu.interpreted import InterpretedBackend, complete, some

SUBJECT, TORCH = Subject(InterpretedBackend()), Subject(ReferenceBackend())
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small vocabularies have many chunks with few candidates."""
    for module in (sampling, adjust, logprobs):
        monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(sampling, "CANDIDATES", 8)
    monkeypatch.setattr(sampling, "SEARCHED", 64)
    monkeypatch.setattr(adjust, "BLOCK", 4)


def make_row(logits: Any, **options: Any) -> Row:
    return Row(logits=np.array(logits, np.float32).astype(np.float64), **options)


def sampled(*rows: Row) -> list[int]:
    ids: list[int] = run_sample(SUBJECT, list(rows)).token_ids.tolist()
    return ids


# -- cases of the conformance kit -------------------------------------------------------------

NAMES = ("sample", "ties", "broken rows", "logprobs")


@complete
@pytest.mark.parametrize(
    "item", [i for c in CHECKS if c.name in NAMES for i in c.items()], ids=lambda item: item.name
)
def test_the_kernels_pass_the_conformance_cases(item: Item) -> None:
    result = item.run(SUBJECT)

    assert result.status == "pass", result.message


# -- random numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", some([0, 1, -1, 2**32, 2**63 - 1, -(2**63)], lambda s: s == -1))
@pytest.mark.parametrize("position", some([0, 2**32 - 1, 2**40 + 3], lambda p: p == 2**40 + 3))
def test_noise_matches_the_portable_definition(seed: int, position: int) -> None:
    expected = philox.gumbel(torch.tensor([seed]), torch.tensor([position]), 32)[0]
    in_order, one_by_one = torch.empty(32), torch.empty(32)

    _noise[(1,)](torch.tensor([seed]), torch.tensor([position]), in_order, one_by_one)

    torch.testing.assert_close(in_order, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(in_order, one_by_one)


def test_the_logarithm_is_accurate_for_the_largest_noise() -> None:
    near_one = 1 - torch.arange(1, 257, dtype=torch.float64) * 2.0**-24
    small_ones = torch.arange(1, 257, dtype=torch.float64) * 2.0**-24
    x = torch.cat((near_one, small_ones, torch.linspace(0.1, 30, 512, dtype=torch.float64))).float()
    out = torch.empty_like(x)

    _log[(1,)](x, out)

    torch.testing.assert_close(out.double(), x.double().log(), rtol=3e-7, atol=0)


def test_integer_keys_have_the_order_of_the_scores() -> None:
    x = torch.tensor([-INF, -3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, INF])
    out = torch.empty(8, dtype=torch.int32)

    _ascending[(1,)](x, out)

    keys = out.tolist()
    assert keys[3] == keys[4]
    assert sorted(set(keys)) == [k for i, k in enumerate(keys) if i != 4]
    assert keys[0] == ordering.NOTHING.value


# -- compared with plain Python ---------------------------------------------------------------


def random_row(rng: np.random.Generator, vocab: int, *, is_coarse: bool) -> Row:
    """A row with a random mixture of parameters; coarse logits have many ties."""

    def some(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.35 else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(0, vocab, count))

    spread = float(rng.choice([0.01, 1.0, 4.0]))
    logits = rng.integers(-12, 12, vocab) / 4 if is_coarse else rng.standard_normal(vocab) * spread
    return make_row(
        logits,
        temperature=float(rng.choice([0.0, 0.5, 0.75, 1.0, 2.0])),
        top_k=some(int(rng.integers(1, vocab + 2)), 0),
        top_p=some(float(np.float32(rng.uniform(0.01, 1.0))), 1.0),
        min_p=some(float(np.float32(rng.uniform(0.0, 1.0))), 0.0),
        seed=int(rng.integers(-(2**63), 2**63 - 1)),
        position=int(rng.integers(0, 2**40)),
        prompt_ids=ids(5),
        output_ids=ids(4),
        presence=some(0.75, 0.0),
        frequency=some(-0.5, 0.0),
        repetition=some(1.25, 1.0),
        bias=some(((ids(1)[0], 2.5), (ids(1)[0], -INF), (ids(1)[0], -1.5)), ()),
        allowed=some(frozenset(ids(1 + vocab // 2)), None),
        target=some(ids(1)[0], -1) if rng.random() < 0.2 else -1,
    )


@pytest.mark.parametrize("is_coarse", [True, False], ids=["ties", "no ties"])
@pytest.mark.parametrize("vocab", some([2, 33, 64, 130, 700], lambda vocab: vocab == 130))
def test_the_sampled_tokens_match_plain_python(vocab: int, is_coarse: bool) -> None:
    rng = np.random.default_rng(vocab)
    rows = [random_row(rng, vocab, is_coarse=is_coarse) for _ in range(10)]
    num_clear = 0
    for row, token_id in zip(rows, sampled(*rows), strict=True):
        expected = reference_sampling.sample(row)
        if expected.margin > 1e-4:  # with less, float32 rounding may decide
            num_clear += 1
            assert token_id == expected.token_id, row
    assert num_clear > (0.6 if vocab < 700 else 0.3) * len(rows)


BELOW = [{"top_k": 90}, {"top_p": 0.97}, {"top_k": 150, "top_p": 0.9},
         {"min_p": 0.01, "top_p": 0.9}, {"top_k": 3, "top_p": 0.99}]  # fmt: skip


@pytest.mark.parametrize("options", some(BELOW, lambda o: o == BELOW[2]), ids=str)
def test_a_threshold_below_the_candidates_is_found_in_the_row(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    rows = [
        make_row(rng.standard_normal(300) * 0.3, seed=i, position=i, **options) for i in range(3)
    ]

    assert sampled(*rows) == run_sample(TORCH, rows).token_ids.tolist()


@complete
def test_parameters_of_rows_are_read_on_the_device() -> None:
    """The host's flags have no effect: one captured sequence serves all rows."""
    rng = np.random.default_rng(2)
    rows = [random_row(rng, 130, is_coarse=False) for _ in range(12)]
    logits = torch.tensor(np.stack([r.logits for r in rows])).float()
    params = sample_params(SUBJECT, rows)
    expected = sampling.sample(logits, params).token_ids

    for is_greedy in (True, False):
        for has_filters in (True, False):
            flags = replace(params, is_greedy=is_greedy, has_filters=has_filters)
            assert torch.equal(sampling.sample(logits, flags).token_ids, expected)


@complete
def test_a_row_samples_the_same_token_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(rng, 130, is_coarse=False) for _ in range(12)]

    assert [sampled(row)[0] for row in rows] == sampled(*rows)


@complete
def test_logits_need_not_be_contiguous_and_are_not_changed() -> None:
    rng = np.random.default_rng(4)
    rows = [random_row(rng, 130, is_coarse=True) for _ in range(6)]
    wide = torch.full((6, 200), NAN)
    wide[:, :130] = torch.tensor(np.stack([r.logits for r in rows]))
    before = wide.clone()

    out = sampling.sample(wide[:, :130], sample_params(SUBJECT, rows, 3))

    expected = run_sample(SUBJECT, rows, 3)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert out.top_ids is not None and expected.top_ids is not None
    assert torch.equal(out.top_ids, expected.top_ids)
    assert torch.equal(wide.nan_to_num(9.5), before.nan_to_num(9.5))


# -- penalties, bias, mask --------------------------------------------------------------------


def test_adjusted_logits_are_bit_identical_to_the_default() -> None:
    rng = np.random.default_rng(5)
    rows = [random_row(rng, 130, is_coarse=False) for _ in range(16)]
    logits = torch.tensor(np.stack([r.logits for r in rows])).float()
    params = sample_params(SUBJECT, rows)
    params.bias = LogitBias(
        rows=torch.tensor([0, 0, 3, 3], dtype=torch.int32),
        token_ids=torch.tensor([5, 5, 7, 129], dtype=torch.int32),
        values=torch.tensor([1.5, -INF, 2.25, INF]),
    )

    assert torch.equal(adjust.adjust(logits, params), portable.adjust(logits, params))


def test_logits_without_adjustments_are_not_copied() -> None:
    logits = torch.zeros(1, 8)

    assert adjust.adjust(logits, sample_params(SUBJECT, [make_row(np.zeros(8))])) is logits


# -- logprobs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", some([(2, 5), (64, 0), (130, 20), (700, 7)], lambda s: s[0] == 130)
)
def test_logprobs_ranks_and_most_likely_tokens_match_the_default(
    sizes: tuple[int, int],
) -> None:
    vocab, num_top = sizes
    rng = np.random.default_rng(6)
    rows = [random_row(rng, vocab, is_coarse=i % 2 == 0) for i in range(4)]

    actual, expected = (run_sample(subject, rows, num_top) for subject in (SUBJECT, TORCH))

    assert torch.equal(actual.token_ids, expected.token_ids)
    assert torch.equal(actual.ranks, expected.ranks)
    assert torch.equal(actual.top_ids, expected.top_ids)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)


# -- NaN and infinite logits ------------------------------------------------------------------


FILTERS = {"top_k": 2, "top_p": 0.5, "min_p": 0.1}


@pytest.mark.parametrize(
    "options", some([{}, {"temperature": 0.0}, FILTERS], lambda o: o == FILTERS), ids=str
)
def test_a_broken_row_returns_minus_one_and_does_not_affect_others(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    others = [make_row(rng.standard_normal(100), position=i, top_p=0.9) for i in range(2)]
    nan = np.zeros(100)
    nan[77] = NAN
    broken = [make_row(nan, **options), make_row(np.full(100, -INF), **options)]

    ids = sampled(others[0], *broken, others[1])

    assert ids[1:3] == [-1, -1]
    assert [ids[0], ids[3]] == sampled(*others)


def test_an_infinite_logit_is_always_sampled() -> None:
    row = make_row([1.0] * 70 + [INF, 2.0])

    for options in (
        {},
        {"temperature": 0.0},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.1},
        {"top_p": 0.9},
    ):
        assert sampled(replace(row, **options)) == [70]


@complete
def test_a_batch_without_rows_returns_empty_results() -> None:
    params = sample_params(SUBJECT, [make_row([1.0, 2.0])], 2)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
        setattr(params, name, getattr(params, name)[:0])

    out = sampling.sample(torch.empty(0, 2), params)

    assert out.token_ids.shape == (0,)
    assert out.top_ids is not None and out.top_ids.shape == (0, 2)


# -- planted faults ---------------------------------------------------------------------------

FAULTS = {
    "noise of the next position": ("position", 1),
    "noise of another seed": ("seed", 1),
    "larger top_k": ("top_k", 1),
    "larger top_p": ("top_p", 0.05),
    "larger min_p": ("min_p", 0.05),
    "higher temperature": ("temperature", 0.25),
}


@complete
@pytest.mark.parametrize("fault", FAULTS)
def test_the_conformance_kit_detects_wrong_sampling(fault: str) -> None:
    field, more = FAULTS[fault]

    class Wrong(InterpretedBackend):
        def sample(self, logits: torch.Tensor, params: Any) -> Any:
            value = getattr(params, field)
            changed = torch.where(value == 0, value, (value + more).to(value.dtype))
            return super().sample(logits, replace(params, **{field: changed}))

    kinds = [i for c in CHECKS if c.name == "sample" for i in c.items()]

    assert any(item.run(Subject(Wrong())).status == "fail" for item in kinds)


# -- kernels that call the functions under test -----------------------------------------------


@triton.jit
def _noise(seed_ptr, position_ptr, in_order_ptr, one_by_one_ptr):
    seed, position, ids = tl.load(seed_ptr), tl.load(position_ptr), tl.arange(0, 32)
    tl.store(in_order_ptr + tl.arange(0, 16), gumbel.noise_from(seed, position, 0, 16))
    tl.store(in_order_ptr + 16 + tl.arange(0, 16), gumbel.noise_from(seed, position, 16, 16))
    tl.store(one_by_one_ptr + ids, gumbel.noise_of(seed, position, ids))


@triton.jit
def _log(x_ptr, out_ptr):
    at = tl.arange(0, 1024)
    tl.store(out_ptr + at, ordering.log(tl.load(x_ptr + at)))


@triton.jit
def _ascending(x_ptr, out_ptr):
    at = tl.arange(0, 8)
    tl.store(out_ptr + at, ordering.ascending(tl.load(x_ptr + at)))
