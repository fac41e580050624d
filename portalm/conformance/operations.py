"""L0: claims. L1: attention and sampling, compared with the float64 reference."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from portalm.backend import (
    SCALED_KV_DTYPES,
    AttentionSpec,
    KVSpec,
    LogitBias,
    Penalties,
    SampleOutput,
    SampleParams,
)
from portalm.conformance import reference, reference_sampling
from portalm.conformance.base import CheckFailed, Named, NotClaimed
from portalm.conformance.cases import (
    BATCHES,
    HEADS,
    NO_PAD,
    AttentionProblem,
    AttentionRun,
    Batch,
    Heads,
    Pad,
    PagedBatch,
    attention_problem,
    batch_named,
    pad_rows,
    step_meta,
)
from portalm.conformance.check import Check
from portalm.conformance.numerics import (
    DTYPES,
    NMSE_BOUND,
    F32Array,
    random_array,
    require_close,
    require_equal,
    rounded,
)
from portalm.conformance.reference_sampling import Row
from portalm.conformance.subject import Subject

_GQA = HEADS[1]
_NEAR = 1e-4
"""Rows whose decisive margin is below this are skipped: float32 may decide them differently."""


@dataclass(frozen=True, slots=True)
class Attend:
    """A case of attention: a batch, a head layout, and options."""

    batch: Batch
    heads: Heads
    dtype: str
    head_size: int | None = None
    block_size: int | None = None
    kv_dtype: str | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False
    value_size: int | None = None
    """Values are the first `value_size` numbers of their keys: latent attention."""

    @property
    def name(self) -> str:
        """The batch, the head layout, the dtype and all options that are set."""
        parts = [self.batch.name, self.heads.name, self.dtype]
        for label, value in (
            ("head", self.head_size),
            ("value in key", self.value_size),
            ("block", self.block_size),
            ("kv", self.kv_dtype),
            ("window", self.sliding_window),
            ("cap", self.soft_cap),
        ):
            if value is not None:
                parts.append(f"{label} {value}")
        parts += ["alibi"] * self.has_alibi + ["sinks"] * self.has_sinks
        return ", ".join(parts)

    def problem(self, subject: Subject) -> AttentionProblem:
        """Create the inputs; raise `NotClaimed` for what the backend does not claim."""
        claims = subject.claims
        subject.needs_dtype(self.dtype)
        is_shared = self.value_size is not None
        for value, claimed, what in (
            (
                self.head_size,
                claims.shared_head_sizes if is_shared else claims.head_sizes,
                "head size",
            ),
            (self.block_size, claims.block_sizes, "block size"),
            (self.kv_dtype, claims.kv_dtypes, "KV dtype"),
        ):
            if value is not None and claimed is not None and value not in claimed:
                raise NotClaimed(f"{what} {value}")
        if self.sliding_window is not None:
            subject.needs_feature("sliding_window")
        if self.soft_cap is not None:
            subject.needs_feature("soft_cap")
        if self.has_alibi:
            subject.needs_feature("alibi")
        if self.has_sinks:
            subject.needs_feature("sinks")
        if is_shared:
            subject.needs_feature("shared_values")
        return attention_problem(
            subject,
            self.batch,
            self.heads,
            self.dtype,
            head_size=self.head_size,
            block_size=self.block_size,
            kv_dtype=self.kv_dtype,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            has_alibi=self.has_alibi,
            has_sinks=self.has_sinks,
            value_size=self.value_size,
        )


def check_attend(subject: Subject, case: Attend) -> float:
    """Write the context, attend, and compare with the reference over the cache's contents."""
    problem = case.problem(subject)
    run = AttentionRun(subject, problem)
    actual = run.run()
    keys, values = problem.key, problem.value
    kv_bound = NMSE_BOUND.get(problem.kv_spec.dtype, 0.0)
    if problem.kv_spec.dtype in SCALED_KV_DTYPES:
        keys, values = run.held()
    expected = [
        reference.attention(
            q.astype(np.float64),
            k.astype(np.float64),
            v.astype(np.float64),
            problem.spec,
            None if problem.sinks is None else problem.sinks.astype(np.float64),
        )
        for q, k, v in zip(problem.query, keys, values, strict=True)
    ]
    bound = max(NMSE_BOUND[case.dtype], kv_bound if case.kv_dtype else 0.0)
    return require_close("attention", np.concatenate(actual), np.concatenate(expected), bound)


def attend_cases() -> list[Attend]:
    """Return cases over batches and dtypes, head layouts, sizes and features."""
    mixed = batch_named("mixed")
    cases = [Attend(batch, _GQA, dtype) for dtype in DTYPES for batch in BATCHES]
    cases += [Attend(mixed, heads, DTYPES[0]) for heads in HEADS]
    cases += [Attend(mixed, _GQA, DTYPES[0], head_size=size) for size in (16, 80, 96, 128, 256)]
    cases += [Attend(mixed, _GQA, DTYPES[0], block_size=size) for size in (8, 32, 64, 128)]
    cases += [Attend(mixed, _GQA, DTYPES[0], kv_dtype=dtype) for dtype in DTYPES[1:]]
    long = batch_named("long context")
    for kv_dtype in SCALED_KV_DTYPES:
        few = (batch_named("decode"), batch_named("prefill"), mixed, long)
        cases += [
            Attend(batch, _GQA, dtype, kv_dtype=kv_dtype) for dtype in DTYPES for batch in few
        ]
        cases += [Attend(mixed, heads, DTYPES[0], kv_dtype=kv_dtype) for heads in HEADS[2:]]
        cases.append(Attend(mixed, _GQA, DTYPES[0], kv_dtype=kv_dtype, head_size=80, block_size=8))
        cases.append(Attend(long, _GQA, DTYPES[0], kv_dtype=kv_dtype, sliding_window=7))
        cases.append(Attend(long, _GQA, DTYPES[0], kv_dtype=kv_dtype, soft_cap=2.0, has_sinks=True))
    cases += [
        Attend(batch, _GQA, DTYPES[0], sliding_window=w)
        for batch in (mixed, long)
        for w in (1, 7, 100)
    ]
    cases += [Attend(batch, _GQA, DTYPES[0], soft_cap=2.0) for batch in (mixed, long)]
    cases += [Attend(batch, _GQA, DTYPES[0], has_alibi=True) for batch in (mixed, long)]
    cases += [Attend(batch, _GQA, DTYPES[0], has_sinks=True) for batch in (mixed, long)]
    cases.append(Attend(long, _GQA, DTYPES[0], sliding_window=7, has_alibi=True, has_sinks=True))
    return cases + latent_cases()


def latent_cases() -> list[Attend]:
    """Return cases whose values are part of their keys: small ones, and DeepSeek's sizes."""
    mqa, lite = HEADS[3], Heads("mqa of 16", 16, 1)
    cases = [Attend(b, mqa, DTYPES[0], head_size=80, value_size=64) for b in BATCHES]
    cases += [Attend(BATCHES[3], mqa, d, head_size=80, value_size=64) for d in DTYPES[1:]]
    cases.append(Attend(BATCHES[3], _GQA, DTYPES[0], head_size=48, value_size=32, block_size=32))
    return cases + [Attend(b, lite, d, head_size=576, value_size=512)
                    for b in BATCHES[1:3] for d in (DTYPES[0], DTYPES[2])]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantize:
    """Keys and values of `dtype`, quantized to `kv_dtype` in the cache."""

    kv_dtype: str
    dtype: str

    @property
    def name(self) -> str:
        """KV dtype and dtype."""
        return f"{self.kv_dtype} from {self.dtype}"


_TIES = 1e-3
"""Fraction of codes that may differ by one unit. x * (1 / scale) is rounded twice, so that about
one code in 2^20 lies at a tie which those roundings decide; a device whose division has an error of
a few units in the last place decides a few more."""


def check_codes(subject: Subject, case: Quantize) -> None:
    """Codes and scales of a token and head do not depend on other tokens and heads."""
    subject.needs_dtype(case.dtype)
    subject.needs_kv_dtype(case.kv_dtype)
    problem = attention_problem(
        subject, Batch("whole", (60,), (60,)), _GQA, case.dtype, kv_dtype=case.kv_dtype
    )
    given = (problem.key[0], problem.value[0])
    for x in given:
        # magnitudes far apart, so that using another scale shows; a few special values
        x *= np.exp2(np.arange(60) % 13 - 6)[:, None, None] * np.array([1, 0.3])[None, :, None]
        x[3], x[4, 1, 2], x[5, 0, 1], x[6, 1, 0] = 0.0, np.nan, np.inf, -np.inf
        x[7, :, 1:] = 0.0
        x[:] = rounded(x, case.dtype)
    run = AttentionRun(subject, problem)
    chunks = run.paged.chunks(problem.batch.query_lens)
    run.write(chunks, run.meta(chunks))
    for what, x, held in zip(("keys", "values"), given, run.held(), strict=True):
        expected, step = reference.quantized(x, case.kv_dtype)
        actual = held[0].astype(np.float64)
        require_equal(f"{what}: NaN where not finite", np.isnan(actual), np.isnan(expected))
        actual, expected = np.nan_to_num(actual), np.nan_to_num(expected)
        largest = np.abs(expected).max(axis=-1)
        require_equal(
            f"{what}: largest magnitude of each vector", np.abs(actual).max(axis=-1), largest
        )
        units = np.abs(actual - expected) / np.maximum(np.nan_to_num(step), 2.0**-120)
        if units.max() > 1.001 or np.count_nonzero(units) > _TIES * units.size:
            raise CheckFailed(
                f"{what}: {np.count_nonzero(units)} of {units.size} codes differ, by up to "
                f"{units.max():.3g} units"
            )


@dataclass(frozen=True, slots=True)
class Encode:
    """A case of encoder attention: prompt lengths, a head layout, a window."""

    lengths: tuple[int, ...]
    heads: Heads
    dtype: str
    sliding_window: int | None = None

    @property
    def name(self) -> str:
        """Lengths, head layout, dtype and window."""
        window = "" if self.sliding_window is None else f", window {self.sliding_window}"
        return f"{'+'.join(map(str, self.lengths))}, {self.heads.name}, {self.dtype}{window}"


def run_encoder(subject: Subject, case: Encode, pad: Pad = NO_PAD) -> list[F32Array]:
    """Return the attention output of each prompt, [N, H, D]; pad tokens hold NaN."""
    size, num_tokens = subject.head_size, sum(case.lengths)
    paged = PagedBatch(case.lengths, subject.block_size, np.random.default_rng(0))
    meta = step_meta(subject, paged.chunks(case.lengths), subject.block_size, [], pad)
    spec = encoder_spec(subject, case)
    q, k, v = encoder_inputs(subject, case)

    def put(x: F32Array) -> torch.Tensor:
        return subject.put(pad_rows(x, len(meta.positions)), case.dtype)

    out = subject.get(subject.backend.attend_encoder(put(q), put(k), put(v), meta, spec))
    assert out.shape[1:] == (case.heads.num_heads, size)
    return np.split(out[:num_tokens], np.cumsum(case.lengths)[:-1])


def encoder_spec(subject: Subject, case: Encode) -> AttentionSpec:
    """Return the attention spec of a case."""
    return AttentionSpec(
        num_heads=case.heads.num_heads,
        num_kv_heads=case.heads.num_kv_heads,
        head_size=subject.head_size,
        scale=subject.head_size**-0.5,
        sliding_window=case.sliding_window,
    )


def encoder_inputs(subject: Subject, case: Encode) -> tuple[F32Array, F32Array, F32Array]:
    """Return query [T, H, D], key and value [T, H_kv, D]; random, seeded by prompt length."""
    parts: list[list[F32Array]] = [[], [], []]
    layout = (case.heads.num_heads, case.heads.num_kv_heads, case.heads.num_kv_heads)
    for length in case.lengths:
        for i, (heads, scale) in enumerate(zip(layout, (2.0, 1.0, 1.0), strict=True)):
            shape = (length, heads, subject.head_size)
            parts[i].append(random_array(shape, case.dtype, 10 * length + i, scale))
    q, k, v = (np.concatenate(one) for one in parts)
    return q, k, v


def check_attend_encoder(subject: Subject, case: Encode) -> float:
    """Compare encoder attention with the reference: each token attends within its own prompt."""
    subject.needs_dtype(case.dtype)
    if case.sliding_window is not None:
        subject.needs_feature("sliding_window")
    actual = run_encoder(subject, case)
    cuts = np.cumsum(case.lengths)[:-1]
    q, k, v = (np.split(x.astype(np.float64), cuts) for x in encoder_inputs(subject, case))
    spec = encoder_spec(subject, case)
    expected = [reference.encoder_attention(*one, spec) for one in zip(q, k, v, strict=True)]
    return require_close(
        "attend_encoder", np.concatenate(actual), np.concatenate(expected), NMSE_BOUND[case.dtype]
    )


ENCODER_BATCH = (1, 1, 33, 7, 17, 7, 64)
"""Prompt lengths: one token, equal lengths, and around block sizes."""


def encode_cases() -> list[Encode]:
    """Return cases over dtypes, head layouts, and windows around tile sizes."""
    cases = [Encode(ENCODER_BATCH, _GQA, dtype) for dtype in DTYPES]
    cases += [Encode(ENCODER_BATCH, _GQA, DTYPES[0], window) for window in (1, 8)]
    cases.append(Encode((130, 300), _GQA, DTYPES[0], 65))
    cases += [Encode((17,), heads, DTYPES[0]) for heads in HEADS]
    return [*cases, Encode((130, 300), HEADS[0], DTYPES[0])]


# -- L0 ---------------------------------------------------------------------------------------


def check_unclaimed_is_refused(subject: Subject, case: Named) -> None:
    """Allocating a KV cache that is not claimed raises `Unsupported`."""
    claims = subject.claims
    usual = KVSpec(
        num_layers=1,
        num_kv_heads=2,
        head_size=subject.head_size,
        block_size=subject.block_size,
        dtype=subject.kv_dtype(subject.dtype),
    )
    claimed: frozenset[int] | frozenset[str] | None
    claimed, value, shape = {
        "head size": (claims.head_sizes, 60, replace(usual, head_size=60)),
        "block size": (claims.block_sizes, 12, replace(usual, block_size=12)),
        "KV dtype": (claims.kv_dtypes, "float8_e5m2", replace(usual, dtype="float8_e5m2")),
    }[case.name]
    if claimed is None or value in claimed:
        return
    with contextlib.suppress(NotClaimed):
        subject.must_refuse(f"{case.name} {value}", lambda: subject.backend.kv_alloc(shape, 4))


def check_memory_and_probe(subject: Subject, case: None) -> None:
    """The device responds, and its memory figures are plausible."""
    subject.backend.probe(30.0)
    memory = subject.backend.memory()
    if not 0 < memory.free <= memory.total:
        raise CheckFailed(f"memory: {memory.free} bytes free of {memory.total}")


def check_round_trip(subject: Subject, case: Named) -> None:
    """Arrays of every dtype that steps use come back from the device unchanged."""
    host = np.arange(-6, 6).reshape(3, 4).astype(case.name)
    require_equal("to_device, to_host", subject.get(subject.backend.to_device(host)), host)


# -- L1: sampling -----------------------------------------------------------------------------


def sample_params(
    subject: Subject, rows: list[Row], num_logprobs: int | None = None
) -> SampleParams:
    """Convert `rows` to the `SampleParams` of a step."""

    def column(values: list[float] | list[int], dtype: type) -> torch.Tensor:
        return subject.backend.to_device(np.array(values, dtype))

    def padded(lists: list[tuple[int, ...]]) -> torch.Tensor:
        width = max(1, *(len(one) for one in lists))
        return column([[*one, *[-1] * (width - len(one))] for one in lists], np.int32)  # type: ignore[arg-type]

    vocab = len(rows[0].logits)
    has_penalties = any(r.presence or r.frequency or r.repetition != 1.0 for r in rows)
    bias = [(i, token, value) for i, r in enumerate(rows) for token, value in r.bias]
    allowed = None
    if any(r.allowed is not None for r in rows):
        mask = np.zeros((len(rows), -(-vocab // 32)), np.uint32)
        for i, row in enumerate(rows):
            for token in range(vocab) if row.allowed is None else row.allowed:
                mask[i, token // 32] |= np.uint32(1) << np.uint32(token % 32)
        allowed = subject.backend.to_device(mask.view(np.int32))
    return SampleParams(
        temperature=column([r.temperature for r in rows], np.float32),
        top_k=column([r.top_k for r in rows], np.int32),
        top_p=column([r.top_p for r in rows], np.float32),
        min_p=column([r.min_p for r in rows], np.float32),
        seed=column([r.seed for r in rows], np.int64),
        position=column([r.position for r in rows], np.int64),
        is_greedy=all(r.temperature == 0 for r in rows),
        has_filters=any(r.top_k or r.top_p < 1 or r.min_p for r in rows),
        penalties=Penalties(
            prompt_ids=padded([r.prompt_ids for r in rows]),
            output_ids=padded([r.output_ids for r in rows]),
            presence=column([r.presence for r in rows], np.float32),
            frequency=column([r.frequency for r in rows], np.float32),
            repetition=column([r.repetition for r in rows], np.float32),
        )
        if has_penalties
        else None,
        bias=LogitBias(
            rows=column([b[0] for b in bias], np.int32),
            token_ids=column([b[1] for b in bias], np.int32),
            values=column([b[2] for b in bias], np.float32),
        )
        if bias
        else None,
        allowed=allowed,
        targets=column([r.target for r in rows], np.int32)
        if any(r.target >= 0 for r in rows)
        else None,
        num_logprobs=num_logprobs,
    )


def run_sample(subject: Subject, rows: list[Row], num_logprobs: int | None = None) -> SampleOutput:
    """Sample all rows in one call."""
    logits = subject.put(np.stack([r.logits for r in rows]).astype(np.float32))
    return subject.backend.sample(logits, sample_params(subject, rows, num_logprobs))


def sampling_rows(kind: str, count: int = 24, vocab: int = 203) -> list[Row]:
    """Return random rows of one kind."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    rows = []
    for i in range(count):
        logits = (rng.standard_normal(vocab) * 2).astype(np.float32).astype(np.float64)
        ids = tuple(
            int(x) for x in np.argsort(-logits)[:9]
        )  # likely tokens, so that an error shows
        kinds: dict[str, Any] = {
            "greedy": {"temperature": 0.0},
            "temperature": {"temperature": float(np.float32(0.3 + i / 10))},
            "top_k": {"top_k": 1 + i % 7},
            "top_p": {"top_p": float(np.float32(0.05 + 0.9 * i / count))},
            "min_p": {"min_p": float(np.float32(0.02 + i / 50))},
            "all filters": {"top_k": 5 + i, "top_p": 0.75, "min_p": 0.015625, "temperature": 0.75},
            "penalties": {
                "temperature": float(i % 2),
                "presence": 0.5,
                "frequency": 0.25,
                "repetition": 1.25,
                "prompt_ids": ids[:4],
                "output_ids": ids[2:] + ids[3:5],
            },
            "bias": {"bias": ((ids[0], 3.0), (ids[1], -np.inf), (ids[0], 1.0)), "temperature": 0.0},
            "allowed": {"allowed": frozenset(ids)},
            "targets": {"target": ids[0] if i % 2 else -1},
            "mixed": [
                {"temperature": 0.0},
                {"top_k": 3},
                {"allowed": frozenset(ids), "temperature": 0.5},
                {"presence": 1.5, "output_ids": ids},
            ][i % 4],
        }
        options: dict[str, Any] = kinds[kind]
        seed = int(rng.integers(-(2**62), 2**62))
        rows.append(Row(logits=logits, seed=seed, position=int(rng.integers(0, 2**33)), **options))
    return rows


SAMPLING_KINDS = (
    "greedy", "temperature", "top_k", "top_p", "min_p", "all filters", "penalties", "bias",
    "allowed", "targets", "mixed",
)  # fmt: skip


def check_sample(subject: Subject, case: Named) -> None:
    """The same token ids as the reference, except where float32 may decide differently."""
    rows = sampling_rows(case.name)
    actual = subject.get(run_sample(subject, rows).token_ids)
    num_clear = 0
    for i, row in enumerate(rows):
        expected = reference_sampling.sample(row)
        if expected.margin < _NEAR:
            continue
        num_clear += 1
        if int(actual[i]) != expected.token_id:
            raise CheckFailed(
                f"row {i} of {case.name}: sampled {int(actual[i])}, expected {expected.token_id} "
                f"(margin {expected.margin:.3g})"
            )
    if num_clear < len(rows) // 2:
        raise CheckFailed(
            f"only {num_clear} of {len(rows)} rows have a clear margin: too few to compare"
        )


def check_ties(subject: Subject, case: None) -> None:
    """The lowest id wins a tie, and a threshold keeps its ties."""
    logits = np.zeros(70)
    logits[[11, 40, 66]] = 5.0
    logits[[20, 30]] = 4.0
    greedy = subject.get(run_sample(subject, [Row(logits=logits, temperature=0.0)]).token_ids)
    require_equal("a tie", greedy, np.array([11], np.int32))
    filters: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1})
    for options in filters:
        rows = [Row(logits=logits, seed=s, **options) for s in range(60)]
        sampled = {int(x) for x in subject.get(run_sample(subject, rows).token_ids)}
        if sampled != {11, 40, 66}:
            raise CheckFailed(f"{options} over three tied tokens sampled {sorted(sampled)}")


def check_broken_rows(subject: Subject, case: None) -> None:
    """A row with a NaN, or without a token that may be sampled, gives -1; others are unaffected."""
    good = np.arange(40, dtype=np.float64)
    nan = good.copy()
    nan[3] = np.nan
    for temperature in (0.0, 1.0):
        rows = [
            Row(logits=good, temperature=temperature, top_k=1),
            Row(logits=nan, temperature=temperature),
            Row(logits=np.full(40, -np.inf), temperature=temperature),
        ]
        sampled = subject.get(run_sample(subject, rows).token_ids)
        require_equal("broken rows", sampled, np.array([39, -1, -1], np.int32))


def check_logprobs(subject: Subject, case: None) -> float:
    """Logprobs of the raw logits, ranks, and the most likely tokens match the reference."""
    rows = sampling_rows("penalties", 6) + sampling_rows("targets", 6)
    out = run_sample(subject, rows, num_logprobs=4)
    if out.logprobs is None or out.ranks is None or out.top_ids is None or out.top_logprobs is None:
        raise CheckFailed("logprobs were requested, but the output lacks them")
    ids, ranks = subject.get(out.token_ids), subject.get(out.ranks)
    expected = [reference_sampling.logprobs(r.logits) for r in rows]
    for i, row in enumerate(rows):
        if int(ranks[i]) != reference_sampling.rank(row.logits, int(ids[i])):
            raise CheckFailed(f"row {i} has the wrong rank {int(ranks[i])}")
        require_equal(
            "top ids",
            subject.get(out.top_ids)[i],
            np.array(reference_sampling.top(row.logits, 4), np.int32),
        )
    chosen = np.array([e[int(t)] for e, t in zip(expected, ids, strict=True)])
    return require_close("logprobs", subject.get(out.logprobs), chosen, NMSE_BOUND["float32"])


def check_distribution(subject: Subject, case: None) -> None:
    """Sampled tokens follow the softmax: a chi-square test over 4,000 seeds."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5])
    rows = [Row(logits=logits, seed=s, position=s % 7) for s in range(4000)]
    counts = np.bincount(subject.get(run_sample(subject, rows).token_ids), minlength=5)
    probs = np.exp(logits) / np.exp(logits).sum()
    statistic = float((np.square(counts - 4000 * probs) / (4000 * probs)).sum())
    if statistic > 23.5:  # 4 degrees of freedom: one in 10,000
        raise CheckFailed(f"chi-square {statistic:.1f} for counts {counts.tolist()}")


CHECKS = (
    Check("L0", "unclaimed shapes are refused", check_unclaimed_is_refused,
          (Named("head size"), Named("block size"), Named("KV dtype"))),
    Check("L0", "the device answers", check_memory_and_probe),
    Check("L0", "host round trip", check_round_trip,
          (Named("int32"), Named("float32"), Named("int64"))),
    Check("L1", "attend", check_attend, attend_cases()),
    Check("L1", "8-bit KV codes", check_codes,
          tuple(Quantize(kv, dtype) for kv in SCALED_KV_DTYPES for dtype in DTYPES)),
    Check("L1", "attend_encoder", check_attend_encoder, encode_cases()),
    Check("L1", "sample", check_sample, tuple(Named(k) for k in SAMPLING_KINDS)),
    Check("L1", "ties", check_ties),
    Check("L1", "broken rows", check_broken_rows),
    Check("L1", "logprobs", check_logprobs),
    Check("L1", "distribution", check_distribution),
)  # fmt: skip
