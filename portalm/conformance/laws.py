"""L2: properties that must hold bit for bit on one backend, whatever its exact results."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch

from portalm.backend import (
    KV,
    SCALED_KV_DTYPES,
    KVSpec,
    SampleOutput,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.conformance import reference
from portalm.conformance.base import CheckFailed, Named
from portalm.conformance.cases import (
    HEADS,
    PAD,
    AttentionRun,
    Batch,
    attention_problem,
    batch_named,
    step_meta,
)
from portalm.conformance.check import Check
from portalm.conformance.numerics import (
    NMSE_BOUND,
    FloatArray,
    require_close,
    require_equal,
    torch_dtype,
)
from portalm.conformance.operations import (
    ENCODER_BATCH,
    Encode,
    run_encoder,
    run_sample,
    sample_params,
    sampling_rows,
)
from portalm.conformance.reference_sampling import Row
from portalm.conformance.subject import Subject, wire_shape
from portalm.errors import BackendError

_GQA = HEADS[1]
_BATCHES = tuple(Named(n) for n in ("decode", "mixed", "ragged", "long context"))


def _problem(subject: Subject, name: str):  # type: ignore[no-untyped-def]
    return attention_problem(subject, batch_named(name), _GQA, subject.dtype)


def check_padding(subject: Subject, case: Named) -> None:
    """Pad tokens, pad requests and pad blocks do not change results."""
    problem = _problem(subject, case.name)
    plain = AttentionRun(subject, problem).run()
    padded = AttentionRun(subject, problem).run(PAD)
    for a, b in zip(plain, padded, strict=True):
        require_equal("with padding", b, a)


def check_permutation(subject: Subject, case: Named) -> None:
    """The physical blocks of a request do not change its results."""
    problem = _problem(subject, case.name)
    one, other = (AttentionRun(subject, problem, layout_seed=s).run() for s in (1, 2))
    for a, b in zip(one, other, strict=True):
        require_equal("in other blocks", b, a)


def check_chunks(subject: Subject, case: Named) -> float | None:
    """A prompt in chunks gives the same results as in one piece."""
    batch = Batch("whole", (70,), (70,))
    problem = attention_problem(subject, batch, _GQA, subject.dtype)
    [whole] = AttentionRun(subject, problem).run()
    run = AttentionRun(subject, problem)
    [chunk] = run.paged.chunks(batch.query_lens)
    cuts = {"in the middle": (0, 33, 70), "token by token": tuple(range(71))}[case.name]
    parts = [run.attend([replace(chunk, start=a, end=b)])[0] for a, b in itertools.pairwise(cuts)]
    return _same(subject, "in chunks", np.concatenate(parts), whole)


def check_alone(subject: Subject, case: Named) -> float | None:
    """A request alone gives the same results as in a batch."""
    problem = _problem(subject, case.name)
    together = AttentionRun(subject, problem).run()
    worst = 0.0
    for i, expected in enumerate(together):
        batch = Batch("alone", (problem.batch.query_lens[i],), (problem.batch.seq_lens[i],))
        alone = replace(
            problem,
            batch=batch,
            query=[problem.query[i]],
            key=[problem.key[i]],
            value=[problem.value[i]],
        )
        [actual] = AttentionRun(subject, alone).run()
        worst = max(worst, _same(subject, f"request {i} alone", actual, expected) or 0.0)
    return worst


def check_encoder_padding(subject: Subject, case: None) -> None:
    """Pad tokens of NaN and pad requests do not change an encoder's results."""
    batch = Encode(ENCODER_BATCH, _GQA, subject.dtype)
    for a, b in zip(run_encoder(subject, batch), run_encoder(subject, batch, PAD), strict=True):
        require_equal("with padding", b, a)


def check_encoder_alone(subject: Subject, case: None) -> float | None:
    """An encoder's prompt alone gives the same results as in a batch."""
    together = run_encoder(subject, Encode(ENCODER_BATCH, _GQA, subject.dtype))
    worst = 0.0
    for length, expected in zip(ENCODER_BATCH, together, strict=True):
        [alone] = run_encoder(subject, Encode((length,), _GQA, subject.dtype))
        worst = max(worst, _same(subject, f"{length} tokens alone", alone, expected) or 0.0)
    return worst


def check_linear_alone(subject: Subject, case: None) -> float | None:
    """A row of a linear layer alone gives the same result as with other rows."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((37, 96)).astype(np.float32)
    packed = subject.backend.pack(subject.put(rng.standard_normal((130, 96)), subject.dtype).cpu())
    rows = subject.put(x, subject.dtype)
    together = subject.get(subject.backend.linear(rows, packed))
    worst = 0.0
    for start, end in ((0, 1), (5, 8), (11, 30), (36, 37)):
        part = subject.get(subject.backend.linear(rows[start:end], packed))
        worst = max(worst, _same(subject, f"rows {start} to {end}", part, together[start:end]) or 0)
    return worst


def _same(subject: Subject, what: str, actual: FloatArray, expected: FloatArray) -> float | None:
    """Require equal bits if batch_invariant is claimed; otherwise return the NMSE."""
    if subject.has("batch_invariant"):
        require_equal(what, actual, expected)
        return None
    return require_close(what, actual, expected, NMSE_BOUND[subject.dtype])


def check_sample_alone(subject: Subject, case: Named) -> None:
    """A row sampled alone gives the same token as in a batch."""
    rows = sampling_rows(case.name, 12)
    together = subject.get(run_sample(subject, rows).token_ids)
    for i, row in enumerate(rows):
        alone = subject.get(run_sample(subject, [row]).token_ids)
        require_equal(f"row {i} alone", alone, together[i : i + 1])


_CACHES = (
    Named("unquantized"), Named("keys only"), *(Named(dtype) for dtype in SCALED_KV_DTYPES)
)  # fmt: skip


def _cache_spec(subject: Subject, case: Named) -> KVSpec:
    """Return the KV spec of a case in `_CACHES`."""
    spec: KVSpec = _problem(subject, "ragged").kv_spec
    if case.name == "keys only":
        subject.needs_feature("shared_values")
        return replace(spec, num_kv_heads=1, head_size=80, shares_values=True)
    if case.name not in SCALED_KV_DTYPES:
        return spec
    subject.needs_kv_dtype(case.name)
    return replace(spec, dtype=case.name)


def _wire(spec: KVSpec, num_blocks: int, seed: int) -> torch.Tensor:
    """Return random wire values, [N, L, P, B, H_kv, D], that a cache of `spec` can represent."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(wire_shape(spec, num_blocks)).astype(np.float32)
    if spec.dtype in SCALED_KV_DTYPES:
        values = reference.quantized(values, spec.dtype)[0].astype(np.float32)
    return torch.from_numpy(values).to(torch_dtype(spec.wire_dtype))


def check_export_import(subject: Subject, case: Named) -> None:
    """Blocks that are exported and imported elsewhere are unchanged, over all layers."""
    spec = _cache_spec(subject, case)
    wire = _wire(spec, 4, seed=5)
    kv = subject.nan_cache(spec, 10)
    kv = subject.backend.kv_import(kv, subject.index([7, 2, 9, 4]), wire)
    exported = subject.export(kv, [9, 7])
    require_equal("export", exported, wire[[2, 0]].float().numpy())
    if not np.isnan(subject.export(kv, [1, 3, 5, 6, 8])).all():
        raise CheckFailed("kv_import wrote to blocks outside its list")


def check_copy(subject: Subject, case: Named) -> None:
    """kv_copy copies all layers of its blocks, and no other blocks."""
    spec = _cache_spec(subject, case)
    wire = _wire(spec, 6, seed=6)
    kv = subject.backend.kv_import(subject.nan_cache(spec, 6), subject.index(range(6)), wire)
    kv = subject.backend.kv_copy(kv, subject.index([1, 4]), subject.index([5, 2]))
    expected = wire.clone()
    expected[5], expected[2] = wire[1], wire[4]
    require_equal("after kv_copy", subject.export(kv, range(6)), expected.float().numpy())


# -- captured steps ---------------------------------------------------------------------------


def _small_step(subject: Subject, batch: str):  # type: ignore[no-untyped-def]
    """Return a step with one of each layer, its weights, cache and inputs."""
    backend, dtype = subject.backend, subject.dtype
    problem = _problem(subject, batch)
    run = AttentionRun(subject, problem)
    run.fill_context()
    spec = problem.spec
    rng = np.random.default_rng(9)
    width = spec.num_heads * spec.head_size
    weights: Weights = {
        "embedding": subject.put(rng.standard_normal((120, width)), dtype),
        "norm": subject.put(rng.standard_normal(width), dtype),
        "head": backend.pack(
            subject.put(rng.standard_normal((120, width)) / 8, dtype).cpu(), for_logits=True
        ),
    }
    chunks = run.paged.chunks(problem.batch.query_lens)
    meta: StepMeta = step_meta(subject, chunks, run.paged.block_size, [spec] * 3)
    rows = [
        Row(logits=np.zeros(120), seed=i, position=9, top_k=20)
        for i in range(len(meta.logits_rows))
    ]
    inputs = StepInputs(
        token_ids=subject.index(rng.integers(0, 120, len(meta.positions))),
        meta=meta,
        sample=sample_params(subject, rows),
    )

    def step(weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        x = backend.embed(inputs.token_ids, weights["embedding"])
        x = backend.rms_norm(x, weights["norm"], 1e-5)
        query = x.view(x.shape[0], spec.num_heads, spec.head_size)
        key = query[:, : spec.num_kv_heads]
        kv = backend.kv_write(kv, 1, key, key, inputs.meta)
        attended = backend.attend(kv, 1, query, inputs.meta, spec).view(x.shape)
        last = backend.take_rows(attended, inputs.meta.logits_rows)
        return kv, backend.sample(backend.logits(last, weights["head"]), inputs.sample)

    return step, weights, run.kv, inputs


def check_compiled(subject: Subject, case: Named) -> None:
    """A captured step samples the same tokens as the step itself, also when repeated."""
    step, weights, kv, inputs = _small_step(subject, case.name)
    kv, eager = step(weights, kv, inputs)
    expected = subject.get(eager.token_ids).copy()
    captured = subject.backend.compile(step, inputs.meta.bucket, inputs)
    for _ in range(3):
        kv, out = captured(weights, kv, inputs)
        require_equal("the captured step", subject.get(out.token_ids), expected)


def check_seal(subject: Subject, case: None) -> None:
    """A new capture is refused inside seal(), and allowed again after it."""
    step, _, _, inputs = _small_step(subject, "ragged")
    with subject.backend.seal():
        try:
            subject.backend.compile(step, inputs.meta.bucket, inputs)
        except BackendError:
            pass
        else:
            raise CheckFailed("a step was captured while the backend was sealed")
    subject.backend.compile(step, inputs.meta.bucket, inputs)


CHECKS = (
    Check("L2", "padding", check_padding, _BATCHES),
    Check("L2", "block permutation", check_permutation, _BATCHES),
    Check("L2", "chunked prefill", check_chunks, (Named("in the middle"), Named("token by token"))),
    Check("L2", "alone or in a batch", check_alone, _BATCHES),
    Check("L2", "encoder padding", check_encoder_padding),
    Check("L2", "encoder alone or in a batch", check_encoder_alone),
    Check("L2", "linear rows alone", check_linear_alone),
    Check("L2", "sampling alone", check_sample_alone, (Named("mixed"), Named("all filters"))),
    Check("L2", "export and import", check_export_import, _CACHES),
    Check("L2", "copy", check_copy, _CACHES),
    Check("L2", "captured step", check_compiled, (Named("ragged"), Named("decode"))),
    Check("L2", "seal", check_seal),
)
