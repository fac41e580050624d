"""L1: the operations of layers, except attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from portalm.backend import Experts, PackedWeight
from portalm.conformance import reference
from portalm.conformance.base import CheckFailed, Named
from portalm.conformance.cases import HEADS, PAD, AttentionRun, attention_problem, batch_named
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
from portalm.conformance.subject import Subject


def check_linear(subject: Subject, case: Named) -> float:
    """Compare linear layers with row counts and widths around tile sizes, and a bias."""
    subject.needs_dtype(case.name)
    worst = 0.0
    for i, (rows, n, k) in enumerate(((1, 64, 64), (3, 7, 65), (17, 130, 96), (64, 33, 256))):
        x, w = random_array((rows, k), case.name, i), random_array((n, k), case.name, i + 50)
        bias = random_array((n,), case.name, i + 99)
        packed = subject.backend.pack(subject.put(w, case.name).cpu())
        out = subject.backend.linear(
            subject.put(x, case.name), packed, subject.put(bias, case.name)
        )
        expected = reference.linear(*(a.astype(np.float64) for a in (x, w, bias)))
        error = require_close(
            f"linear {rows} x {n} x {k}", subject.get(out), expected, NMSE_BOUND[case.name]
        )
        worst = max(worst, error)
    return worst


def check_logits(subject: Subject, case: Named) -> float:
    """Logits are float32, and as precise as float32 for every dtype of the inputs."""
    subject.needs_dtype(case.name)
    x, w = random_array((5, 96), case.name, 1), random_array((301, 96), case.name, 2)
    packed = subject.backend.pack(subject.put(w, case.name).cpu(), for_logits=True)
    out = subject.backend.logits(subject.put(x, case.name), packed)
    if out.dtype != torch.float32:
        raise CheckFailed(f"logits are {out.dtype}, expected float32")
    expected = reference.linear(x.astype(np.float64), w.astype(np.float64))
    return require_close("logits", subject.get(out), expected, NMSE_BOUND["float32"])


def check_linear_heads(subject: Subject, case: Named) -> float:
    """Compare linear_heads; its input [T, H, K] is a view of wider rows."""
    subject.needs_dtype(case.name)
    worst = 0.0
    for i, (rows, n, k) in enumerate(((1, 48, 32), (9, 70, 24))):
        wide, w = random_array((rows, 5 * k), case.name, i), random_array((3, n, k), case.name, 9)
        packed = subject.backend.pack_heads(subject.put(w, case.name).cpu())
        x = subject.put(wide, case.name)[:, k : 4 * k].view(rows, 3, k)
        out = subject.get(subject.backend.linear_heads(x, packed))
        expected = reference.linear_heads(
            wide.astype(np.float64).reshape(rows, 5, k)[:, 1:4], w.astype(np.float64)
        )
        worst = max(worst, require_close("linear_heads", out, expected, NMSE_BOUND[case.name]))
    return worst


def check_norms(subject: Subject, case: Named) -> float:
    """Compare rms_norm, and add_rms_norm, whose sum is rounded once."""
    subject.needs_dtype(case.name)
    x, residual = random_array((7, 72), case.name, 1, 3.0), random_array((7, 72), case.name, 2)
    weight = random_array((72,), case.name, 3)

    def put(a: F32Array) -> torch.Tensor:
        return subject.put(a, case.name)

    bound = NMSE_BOUND[case.name]
    normed = subject.get(subject.backend.rms_norm(put(x), put(weight), 1e-5))
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5)
    first = require_close("rms_norm", normed, expected, bound)
    out, total = subject.backend.add_rms_norm(put(x), put(residual), put(weight), 1e-5)
    summed = rounded(x + residual, case.name)
    require_equal("add_rms_norm's sum", subject.get(total), summed)
    expected = reference.rms_norm(summed.astype(np.float64), weight.astype(np.float64), 1e-5)
    return max(first, require_close("add_rms_norm", subject.get(out), expected, bound))


def check_layer_norm(subject: Subject, case: Named) -> float:
    """Compare layer_norm on rows far from zero, one of them constant."""
    subject.needs_dtype(case.name)
    x = rounded(random_array((7, 72), case.name, 1, 3.0) + 4, case.name)
    x[3] = 2.0
    weight, bias = random_array((72,), case.name, 2), random_array((72,), case.name, 3)
    out = subject.backend.layer_norm(
        subject.put(x, case.name),
        subject.put(weight, case.name),
        subject.put(bias, case.name),
        1e-5,
    )
    expected = reference.layer_norm(
        x.astype(np.float64), weight.astype(np.float64), bias.astype(np.float64), 1e-5
    )
    return require_close("layer_norm", subject.get(out), expected, NMSE_BOUND[case.name])


def check_gelu(subject: Subject, case: Named) -> float:
    """Compare gelu, also at large values of both signs."""
    subject.needs_dtype(case.name)
    x = random_array((5, 41), case.name, 1, 3.0)
    x[0, :2] = (-90.0, 90.0)
    out = subject.get(subject.backend.gelu(subject.put(x, case.name)))
    return require_close("gelu", out, reference.gelu(x.astype(np.float64)), NMSE_BOUND[case.name])


def check_gelu_tanh(subject: Subject, case: Named) -> float:
    """Compare gelu_tanh and gelu_tanh_mul, also at large values of both signs."""
    subject.needs_dtype(case.name)
    x = random_array((5, 2 * 41), case.name, 1, 3.0)
    x[0, :2] = (-90.0, 90.0)
    plain = subject.get(subject.backend.gelu_tanh(subject.put(x, case.name)))
    gated = subject.get(subject.backend.gelu_tanh_mul(subject.put(x, case.name)))
    wide, bound = x.astype(np.float64), NMSE_BOUND[case.name]
    return max(
        require_close("gelu_tanh", plain, reference.gelu_tanh(wide), bound),
        require_close("gelu_tanh_mul", gated, reference.gelu_tanh_mul(wide), bound),
    )


def check_head_norms(subject: Subject, case: Named) -> float:
    """Compare both norms per head; their input [T, H, D] is a view of wider rows."""
    subject.needs_dtype(case.name)
    wide = random_array((7, 5 * 24), case.name, 1, 3.0)
    weight, bias = random_array((24,), case.name, 2), random_array((24,), case.name, 3)
    heads = subject.put(wide, case.name)[:, 24 : 4 * 24].view(7, 3, 24)
    scale, shift = subject.put(weight, case.name), subject.put(bias, case.name)
    x = wide.astype(np.float64).reshape(7, 5, 24)[:, 1:4]
    w, b = weight.astype(np.float64), bias.astype(np.float64)
    bound = NMSE_BOUND[case.name]
    rms = subject.get(subject.backend.rms_norm(heads, scale, 1e-5))
    layer = subject.get(subject.backend.layer_norm(heads, scale, shift, 1e-5))
    return max(
        require_close("rms_norm per head", rms, reference.rms_norm(x, w, 1e-5), bound),
        require_close("layer_norm per head", layer, reference.layer_norm(x, w, b, 1e-5), bound),
    )


def check_silu_mul(subject: Subject, case: Named) -> float:
    """Compare silu_mul, also at large values of both signs."""
    subject.needs_dtype(case.name)
    gate_up = random_array((5, 2 * 41), case.name, 1, 4.0)
    gate_up[0, :2] = (-90.0, 90.0)
    out = subject.get(subject.backend.silu_mul(subject.put(gate_up, case.name)))
    return require_close(
        "silu_mul", out, reference.silu_mul(gate_up.astype(np.float64)), NMSE_BOUND[case.name]
    )


@dataclass(frozen=True, slots=True)
class Mixture:
    """A case of moe: plain experts, or with biases and a clamped gate as in gpt-oss."""

    dtype: str
    is_clamped: bool

    @property
    def name(self) -> str:
        """Dtype and kind of expert."""
        return f"{self.dtype}, {'clamped' if self.is_clamped else 'silu'}"


def check_moe(subject: Subject, case: Mixture) -> float:
    """Compare nine tokens over five experts; one expert has no tokens, one has all."""
    subject.needs_dtype(case.dtype)
    num_experts, hidden, inner = 5, 64, 48
    x = random_array((9, hidden), case.dtype, 1)
    gate_up = random_array((num_experts, 2 * inner, hidden), case.dtype, 2, hidden**-0.5)
    down = random_array((num_experts, hidden, inner), case.dtype, 3, inner**-0.5)
    biases = [random_array((num_experts, n), case.dtype, n) for n in (2 * inner, hidden)]
    ids = np.array([(2, (0, 1, 4)[i % 3]) for i in range(9)], np.int32)
    shares = np.random.default_rng(4).uniform(0.1, 0.9, (9, 2)).astype(np.float32)

    def packed(weights: F32Array) -> tuple[PackedWeight, ...]:
        put = (subject.put(weight, case.dtype).cpu() for weight in weights)
        return tuple(subject.backend.pack(weight) for weight in put)

    experts = Experts(gate_up=packed(gate_up), down=packed(down))
    if case.is_clamped:
        wide, narrow = (subject.put(bias, case.dtype) for bias in biases)
        experts = replace(
            experts, gate_up_bias=wide, down_bias=narrow, swiglu_limit=1.5, swiglu_alpha=1.7
        )
    out = subject.backend.moe(
        subject.put(x, case.dtype), subject.index(ids), subject.put(shares), experts
    )
    first, last = (bias.astype(np.float64) for bias in biases)
    expected = reference.moe(
        x.astype(np.float64),
        ids,
        shares.astype(np.float64),
        list(gate_up.astype(np.float64)),
        list(down.astype(np.float64)),
        (first, last) if case.is_clamped else None,
        experts.swiglu_limit,
        experts.swiglu_alpha,
    )
    return require_close("moe", subject.get(out), expected, NMSE_BOUND[case.dtype])


@dataclass(frozen=True, slots=True)
class Rope:
    """A case of rope: the number of rotated dimensions, and the layout of pairs."""

    dtype: str
    rotary_dim: int
    is_interleaved: bool

    @property
    def name(self) -> str:
        """Dtype, rotated dimensions and layout."""
        kind = "interleaved" if self.is_interleaved else "halves"
        return f"{self.dtype}, {self.rotary_dim} of 64, {kind}"


def check_rope(subject: Subject, case: Rope) -> float:
    """Compare rotated queries and keys at positions that are not in order."""
    subject.needs_dtype(case.dtype)
    query, key = random_array((6, 4, 64), case.dtype, 1), random_array((6, 2, 64), case.dtype, 2)
    table = reference.rope_table(128, case.rotary_dim, 10_000.0).astype(np.float32)
    positions = np.array([0, 1, 77, 5, 5, 127], np.int32)
    rotated = subject.backend.rope(
        subject.put(query, case.dtype),
        subject.put(key, case.dtype),
        subject.index(positions),
        subject.put(table),
        is_interleaved=case.is_interleaved,
    )
    return max(
        require_close(
            "rope",
            subject.get(actual),
            reference.rope(
                x.astype(np.float64), positions, table.astype(np.float64), case.is_interleaved
            ),
            NMSE_BOUND[case.dtype],
        )
        for x, actual in zip((query, key), rotated, strict=True)
    )


def check_rope_kv_write(subject: Subject, case: Rope) -> float:
    """Compare a mixed step with pad tokens of NaN; only the step's slots are written.

    Query, key and value are views of wider rows, as a merged projection returns them.
    """
    subject.needs_dtype(case.dtype)
    problem = attention_problem(subject, batch_named("mixed"), HEADS[1], case.dtype, head_size=64)
    run = AttentionRun(subject, problem)
    chunks = run.paged.chunks(problem.batch.query_lens)
    meta = run.meta(chunks, PAD)
    heads, kv_heads = problem.spec.num_heads, problem.spec.num_kv_heads
    x = np.full((len(meta.positions), heads + 2 * kv_heads, 64), np.nan, np.float32)
    num_tokens = sum(problem.batch.query_lens)
    x[:num_tokens] = random_array((num_tokens, *x.shape[1:]), case.dtype, 5)
    parts = np.split(x[:num_tokens].astype(np.float64), [heads, heads + kv_heads], axis=1)
    query, key, value = torch.split(subject.put(x, case.dtype), [heads, kv_heads, kv_heads], dim=1)
    table = reference.rope_table(256, case.rotary_dim, 10_000.0).astype(np.float32)
    kv, rotated = subject.backend.rope_kv_write(
        run.kv, run.LAYER, query, key, value, meta, subject.put(table),
        is_interleaved=case.is_interleaved,
    )  # fmt: skip
    positions = np.concatenate([np.arange(c.start, c.end) for c in chunks]).astype(np.int32)
    wide = table.astype(np.float64)
    turned, turned_key = (
        reference.rope(a, positions, wide, case.is_interleaved) for a in parts[:2]
    )
    wire = subject.export(kv, range(run.paged.num_blocks))  # [NB, L, 2, B, H_kv, D]
    slots = np.concatenate([run.paged.slots(i)[c.start : c.end] for i, c in enumerate(chunks)])
    block, offset = np.divmod(slots, run.paged.block_size)
    stored = wire[block, run.LAYER, :, offset]  # [T, 2, H_kv, D]
    bound = NMSE_BOUND[case.dtype]
    require_equal("values", stored[:, 1], parts[2])
    wire[block, run.LAYER, :, offset] = np.nan
    if not np.isnan(wire[1:]).all():
        raise CheckFailed("rope_kv_write wrote to slots outside its mapping")
    return max(
        require_close("query", subject.get(rotated)[:num_tokens], turned, bound),
        require_close("key in the cache", stored[:, 0], turned_key, bound),
    )


def check_rows(subject: Subject, case: Named) -> None:
    """Require that embed and take_rows copy rows unchanged."""
    subject.needs_dtype(case.name)
    table, rows = random_array((50, 40), case.name, 1), np.array([0, 49, 7, 7], np.int32)
    for operation in (
        subject.backend.embed(subject.index(rows), subject.put(table, case.name)),
        subject.backend.take_rows(subject.put(table, case.name), subject.index(rows)),
    ):
        require_equal("rows", subject.get(operation), table[rows])


_DTYPE_CASES = tuple(Named(d) for d in DTYPES)

CHECKS = (
    Check("L1", "linear", check_linear, _DTYPE_CASES),
    Check("L1", "logits", check_logits, _DTYPE_CASES),
    Check("L1", "linear_heads", check_linear_heads, _DTYPE_CASES),
    Check("L1", "rms_norm", check_norms, _DTYPE_CASES),
    Check("L1", "layer_norm", check_layer_norm, _DTYPE_CASES),
    Check("L1", "norms per head", check_head_norms, _DTYPE_CASES),
    Check("L1", "silu_mul", check_silu_mul, _DTYPE_CASES),
    Check("L1", "gelu", check_gelu, _DTYPE_CASES),
    Check("L1", "gelu_tanh", check_gelu_tanh, _DTYPE_CASES),
    Check("L1", "moe", check_moe, tuple(Mixture(d, c) for d in DTYPES for c in (False, True))),
    Check("L1", "rope", check_rope,
          tuple(Rope(d, n, i) for d in DTYPES for n in (64, 32) for i in (False, True))),
    Check("L1", "rope_kv_write", check_rope_kv_write,
          tuple(Rope(d, n, i) for d in DTYPES for n, i in ((64, False), (32, True)))),
    Check("L1", "embed and take_rows", check_rows, _DTYPE_CASES),
)  # fmt: skip
