"""Sampling tokens: the distribution, the filters, and independence of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from portalm.backend import LogitBias, Penalties, SampleOutput
from portalm.conformance import reference_sampling
from portalm.conformance.operations import run_sample
from portalm.conformance.reference_sampling import Row
from portalm.conformance.subject import Subject
from portalm_backends.portable import sampling
from portalm_backends.reference.backend import ReferenceBackend

SUBJECT = Subject(ReferenceBackend())
INF, NAN = math.inf, math.nan
NUM_SAMPLES = 10_000


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Use one thread: these operations are too small to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_row(logits: Sequence[float], **options: Any) -> Row:
    return Row(logits=np.array(logits, np.float64), **options)


def sample(rows: list[Row], num_logprobs: int | None = None) -> SampleOutput:
    """Sample all rows in one call of the portable sampler."""
    return run_sample(SUBJECT, rows, num_logprobs)


def sample_ids(*rows: Row) -> list[int]:
    ids: list[int] = sample(list(rows)).token_ids.tolist()
    return ids


def logits_of(probs: Sequence[float]) -> list[float]:
    """Logits whose softmax is `probs`."""
    return [math.log(p) if p > 0 else -INF for p in probs]


def possible(row: Row, num_samples: int = 2000) -> set[int]:
    """Return the tokens that `row` samples at many positions."""
    return set(sample_ids(*(replace(row, position=i) for i in range(num_samples))))


# -- against plain Python -------------------------------------------------------------


def random_row(rng: np.random.Generator, vocab: int) -> Row:
    """Return a row of few different logits, so that there are ties, with random options."""

    def some(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.35 else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(0, vocab, count))

    allowed = frozenset(ids(1 + vocab // 2))
    return make_row(
        rng.integers(-12, 12, vocab) / 4,
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
        allowed=some(allowed, None),
        target=some(ids(1)[0], -1),
    )


def test_samples_the_tokens_that_plain_python_samples() -> None:
    rng = np.random.default_rng(0)
    num_clear = num_rows = 0
    for vocab in (2, 3, 7, 31, 32, 33, 64, 130):
        for _ in range(8):
            rows = [random_row(rng, vocab) for _ in range(12)]
            for row, token_id in zip(rows, sample_ids(*rows), strict=True):
                expected = reference_sampling.sample(row)
                num_rows += 1
                if expected.margin > 1e-4:  # closer ones may differ in float32
                    num_clear += 1
                    assert token_id == expected.token_id, row
    assert num_clear > 0.7 * num_rows


def test_logprobs_are_those_of_the_raw_logits() -> None:
    rng = np.random.default_rng(1)
    rows = [random_row(rng, 33) for _ in range(24)]

    out = sample(rows, num_logprobs=5)

    assert out.logprobs is not None and out.ranks is not None
    assert out.top_ids is not None and out.top_logprobs is not None
    for i, row in enumerate(rows):
        expected = torch.tensor(reference_sampling.logprobs(row.logits)).float()
        token_id = int(out.token_ids[i])
        torch.testing.assert_close(out.logprobs[i], expected[token_id])
        assert int(out.ranks[i]) == reference_sampling.rank(row.logits, token_id)
        assert out.top_ids[i].tolist() == reference_sampling.top(row.logits, 5)
        torch.testing.assert_close(out.top_logprobs[i], expected[out.top_ids[i].long()])


# -- the distribution -------------------------------------------------------------------------


def chi_square_limit(num_cells: int) -> float:
    """Limit that is exceeded by chance once in a million (Wilson and Hilferty, 1931)."""
    dof = num_cells - 1
    return dof * (1 - 2 / (9 * dof) + 4.75 * math.sqrt(2 / (9 * dof))) ** 3


def assert_distributed(counts: npt.NDArray[np.int64], probs: Sequence[float]) -> None:
    expected = np.array(probs) * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any(), "sampled an impossible token"
    statistic = float(np.sum((counts - expected)[possible] ** 2 / expected[possible]))
    assert statistic < chi_square_limit(int(possible.sum())), counts.tolist()


SOME = (0.05, 0.4, 0.1, 0.15, 0.3)
DISTRIBUTIONS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "unchanged": ({}, SOME),
    "temperature 0.5": ({"temperature": 0.5}, tuple(p**2 for p in SOME)),
    "temperature 2": ({"temperature": 2.0}, tuple(p**0.5 for p in SOME)),
    "top_k 3": ({"top_k": 3}, (0, 0.4, 0, 0.15, 0.3)),
    "top_p 0.75": ({"top_p": 0.75}, (0, 0.4, 0, 0.15, 0.3)),
    "min_p 0.3": ({"min_p": 0.3}, (0, 0.4, 0, 0.15, 0.3)),
    "top_k, then top_p of the rest": ({"top_k": 3, "top_p": 0.75}, (0, 0.4, 0, 0, 0.3)),
    "min_p, then top_p of the rest": ({"min_p": 0.3, "top_p": 0.8}, (0, 0.4, 0, 0, 0.3)),
    "filters after temperature": (
        {"temperature": 0.5, "top_p": 0.8}, (0, 0.4**2, 0, 0, 0.3**2),
    ),
    "bias": ({"bias": ((0, math.log(4)), (1, -INF))}, (0.2, 0, 0.1, 0.15, 0.3)),
    "allowed": ({"allowed": frozenset((0, 2, 4))}, (0.05, 0, 0.1, 0, 0.3)),
    "presence": (
        {"presence": 1.0, "output_ids": (1, 1)}, (0.05, 0.4 / math.e, 0.1, 0.15, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("over", ["positions", "seeds"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_follow_the_requested_distribution(name: str, over: str) -> None:
    options, weights = DISTRIBUTIONS[name]
    row = make_row(logits_of(SOME), **options)
    field = {"positions": "position", "seeds": "seed"}[over]

    ids = sample_ids(*(replace(row, **{field: i}) for i in range(NUM_SAMPLES)))

    assert_distributed(np.bincount(ids, minlength=5), np.array(weights) / sum(weights))


def test_samples_at_adjacent_positions_are_independent() -> None:
    row = make_row(logits_of(SOME), seed=12)

    ids = np.array(sample_ids(*(replace(row, position=i) for i in range(NUM_SAMPLES))))

    pairs = np.bincount(ids[:-1] * 5 + ids[1:], minlength=25)
    assert_distributed(pairs, np.outer(SOME, SOME).ravel())


def test_samples_of_adjacent_seeds_are_independent() -> None:
    row = make_row(logits_of(SOME), position=3)

    ids = np.array(sample_ids(*(replace(row, seed=i) for i in range(NUM_SAMPLES))))

    pairs = np.bincount(ids[:-1] * 5 + ids[1:], minlength=25)
    assert_distributed(pairs, np.outer(SOME, SOME).ravel())


# -- filters ----------------------------------------------------------------------------------


def test_top_k_keeps_the_ties_of_the_last_one() -> None:
    assert possible(make_row([1, 2, 2, 2, 0], top_k=2)) == {1, 2, 3}


def test_top_p_keeps_the_ties_of_the_last_one() -> None:
    # two of the three tied tokens would do; the order of a sort must not decide which
    assert possible(make_row(logits_of([0.1, 0.3, 0.3, 0.3]), top_p=0.5)) == {1, 2, 3}


def test_min_p_keeps_a_token_at_its_threshold() -> None:
    assert possible(make_row([0.0, 0.0, -5.0], min_p=1.0)) == {0, 1}


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    quarters = [0.0, 0.0, 0.0, 0.0]  # exactly 0.25 each, so that two reach 0.5
    ordered = [x - 1e-6 * i for i, x in enumerate(quarters)]  # but no ties

    assert possible(make_row(ordered, top_p=0.25001)) == {0, 1}
    assert possible(make_row(ordered, top_p=0.1)) == {0}
    assert possible(make_row(ordered, top_p=0.76)) == {0, 1, 2, 3}


def test_top_k_comes_before_top_p() -> None:
    row = make_row(logits_of([0.4, 0.3, 0.2, 0.1]), top_p=0.5)

    assert possible(row) == {0, 1}
    assert possible(replace(row, top_k=2)) == {0}  # 0.4 of 0.7 is more than half


def test_the_most_likely_token_is_always_kept() -> None:
    row = make_row([3.0, 1.0, 2.0], temperature=5.0)

    assert possible(replace(row, top_k=1)) == {0}
    assert possible(replace(row, top_p=1e-9)) == {0}
    assert possible(replace(row, min_p=1.0)) == {0}


def test_filters_that_are_off_change_nothing() -> None:
    rng = np.random.default_rng(2)
    rows = [make_row(rng.standard_normal(50), position=i) for i in range(200)]
    filtered = make_row(rng.standard_normal(50), top_k=2)

    assert sample_ids(*rows, filtered)[:-1] == sample_ids(*rows)
    assert sample_ids(*(replace(r, top_k=50) for r in rows)) == sample_ids(*rows)
    assert sample_ids(*(replace(r, top_k=1000) for r in rows)) == sample_ids(*rows)


def test_a_forbidden_token_is_not_sampled_with_any_filter() -> None:
    row = make_row([5.0, 4.0, 3.0, 2.0], bias=((0, -INF),), temperature=3.0)

    for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}):
        assert 0 not in possible(replace(row, **options), 300)


# -- independence of rows ---------------------------------------------------------------------


def equal_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    assert a is not None and b is not None
    return torch.equal(a, b)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("vocab", [5, 33, 1001, 4096])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(vocab: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    rng = np.random.default_rng(vocab)
    rows = [replace(random_row(rng, vocab), logits=rng.standard_normal(vocab)) for _ in range(17)]
    together = sample(rows, num_logprobs=4)

    for i, row in enumerate(rows):
        alone = sample([row], num_logprobs=4)
        for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
            assert equal_bits(getattr(alone, name)[0], getattr(together, name)[i]), (name, row)


def test_the_same_request_samples_the_same_tokens_again() -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(rng, 64) for _ in range(32)]

    assert sample_ids(*rows) == sample_ids(*rows) == sample_ids(*rows[::-1])[::-1]


def test_a_greedy_row_ignores_its_seed_in_a_mixed_batch() -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(40)
    rows = [
        make_row(logits, temperature=float(i % 2), seed=i, top_k=3 * (i % 3)) for i in range(60)
    ]

    ids = sample_ids(*rows)

    assert set(ids[::2]) == {int(np.argmax(logits))}
    assert len(set(ids[1::2])) > 1


def test_an_argmax_takes_the_lowest_id_of_a_tie() -> None:
    assert sample_ids(make_row([1, 7, 7, 2, 7], temperature=0.0)) == [1]
    assert sample_ids(make_row([-0.0, 0.0, -1.0], temperature=0.0)) == [0]


def test_the_logits_are_not_changed() -> None:
    rng = np.random.default_rng(5)
    rows = [random_row(rng, 40) for _ in range(12)]
    logits = torch.tensor(np.stack([r.logits for r in rows])).float()
    before = logits.clone()
    penalties = Penalties(
        prompt_ids=torch.ones(12, 1, dtype=torch.int32),
        output_ids=torch.ones(12, 1, dtype=torch.int32),
        presence=torch.ones(12),
        frequency=torch.ones(12),
        repetition=torch.full((12,), 1.5),
    )
    bias = LogitBias(
        rows=torch.zeros(1, dtype=torch.int32),
        token_ids=torch.zeros(1, dtype=torch.int32),
        values=torch.ones(1),
    )

    changed = sampling.apply_bias(sampling.apply_penalties(logits, penalties), bias)
    sampling.apply_mask(logits, torch.zeros(12, 2, dtype=torch.int32))

    assert not torch.equal(changed, before)
    assert torch.equal(logits, before)


# -- penalties, bias, masks, targets ----------------------------------------------------------


def penalized(logits: Sequence[float], **values: Any) -> list[float]:
    """Logits of one row after penalties."""
    known = {"prompt_ids": [], "output_ids": [], "presence": 0.0, "frequency": 0.0}
    given = {**known, "repetition": 1.0, **values}
    ids = {
        name: torch.tensor([[*given[name], -1, -1]], dtype=torch.int32)
        for name in ("prompt_ids", "output_ids")
    }
    sizes = {name: torch.tensor([given[name]]) for name in ("presence", "frequency", "repetition")}
    out = sampling.apply_penalties(torch.tensor([logits]), Penalties(**ids, **sizes))
    result: list[float] = out[0].tolist()
    return result


def test_repetition_counts_prompt_and_answer_once_per_token() -> None:
    out = penalized([2.0, -2.0, 2.0, 2.0], repetition=2.0, prompt_ids=[0, 0, 1], output_ids=[1, 2])

    assert out == [1.0, -4.0, 1.0, 2.0]


def test_presence_counts_the_answer_once_per_token() -> None:
    assert penalized([2.0, 2.0, 2.0], presence=0.5, prompt_ids=[0], output_ids=[1, 1]) == [
        2,
        1.5,
        2,
    ]


def test_frequency_counts_every_occurrence_in_the_answer() -> None:
    out = penalized([2.0, 2.0, 2.0], frequency=0.5, prompt_ids=[0, 0], output_ids=[1, 1, 2])

    assert out == [2.0, 1.0, 1.5]


def test_repetition_is_applied_before_the_other_penalties() -> None:
    out = penalized([2.0], repetition=2.0, presence=0.5, frequency=0.25, output_ids=[0, 0])

    assert out == [2.0 / 2.0 - 2 * 0.25 - 0.5]


def test_biases_add_up_and_minus_infinity_wins() -> None:
    row = make_row([0, 0, 0], temperature=0.0, bias=((1, 3.0), (1, 2.0), (2, 100.0), (2, -INF)))

    assert sample_ids(row) == [1]
    assert sample_ids(replace(row, bias=((1, 3.0), (1, -2.0), (2, 1.5)))) == [2]


@pytest.mark.parametrize("token_id", [0, 1, 30, 31, 32, 62, 63, 64, 69])
def test_every_bit_of_a_mask_is_one_token(token_id: int) -> None:
    row = make_row(np.linspace(1, 0, 70), allowed=frozenset([token_id]))

    assert sample_ids(row, replace(row, temperature=0.0)) == [token_id, token_id]


def test_a_target_row_reports_its_target_without_sampling() -> None:
    logits = [0.0, 3.0, 1.0]

    out = sample([make_row(logits, target=2), make_row(logits, temperature=0.0)], num_logprobs=0)

    assert out.logprobs is not None and out.ranks is not None and out.top_ids is not None
    assert out.token_ids.tolist() == [2, 1]
    assert out.ranks.tolist() == [2, 1]
    assert out.top_ids.shape == (2, 0)
    torch.testing.assert_close(out.logprobs[0], torch.tensor(logits).log_softmax(0)[2])


# -- the most likely tokens -------------------------------------------------------------------


def test_most_likely_tokens_come_in_order_with_ties_to_the_lowest_id() -> None:
    logits = torch.tensor([[-1.0, 2.0, -0.0, 2.0, 0.0, -INF, -3.0, INF]])

    assert sampling.most_likely(logits, 8).tolist() == [[7, 1, 3, 2, 4, 0, 6, 5]]
    assert sampling.most_likely(logits, 3).tolist() == [[7, 1, 3]]


def test_most_likely_tokens_are_those_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(6)
    coarse = torch.randint(-40, 40, (9, 3000), generator=generator) / 8
    fine = torch.randn(9, 3000, generator=generator) * 1e-30
    for logits in (coarse, fine):
        expected = logits.sort(dim=-1, descending=True, stable=True).indices

        assert torch.equal(sampling.most_likely(logits, 20), expected[:, :20])


def test_at_most_the_whole_vocabulary_is_reported() -> None:
    out = sample([make_row([1.0, 2.0])], num_logprobs=5)

    assert out.top_ids is not None and out.top_ids.tolist() == [[1, 0]]


# -- rows that are broken ---------------------------------------------------------------------

BROKEN: dict[str, Row] = {
    "a NaN": make_row([1.0, NAN, 2.0]),
    "a NaN, greedy": make_row([1.0, NAN, 2.0], temperature=0.0),
    "a NaN, filtered": make_row([1.0, NAN, 2.0], top_k=1, top_p=0.5, min_p=0.1),
    "nothing but NaN": make_row([NAN, NAN, NAN]),
    "nothing but -inf": make_row([-INF, -INF, -INF]),
    "nothing but -inf, greedy": make_row([-INF, -INF, -INF], temperature=0.0),
    "nothing but -inf, filtered": make_row([-INF] * 3, top_k=2, top_p=0.5, min_p=0.1),
    "all forbidden": make_row([1.0, 2.0, 3.0], bias=tuple((i, -INF) for i in range(3))),
    "none allowed": make_row([1.0, 2.0, 3.0], allowed=frozenset()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_gives_minus_one_and_affects_no_other_row(name: str) -> None:
    rng = np.random.default_rng(7)
    others = [make_row(rng.standard_normal(3), position=i, top_p=0.9) for i in range(10)]

    ids = sample_ids(*others[:5], BROKEN[name], *others[5:])

    assert ids[5] == -1
    assert ids[:5] + ids[6:] == sample_ids(*others)


def test_a_logit_of_infinity_wins() -> None:
    row = make_row([1.0, INF, 2.0])

    assert sample_ids(
        row,
        replace(row, temperature=0.0),
        replace(row, top_k=2, top_p=0.5, min_p=0.1),
        replace(row, top_p=0.9),
    ) == [1, 1, 1, 1]
