"""Steps recorded as native programs: equal to the step call by call, or not recorded."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from portalm.backend import AttentionSpec, KVSpec, SampleParams, StepInputs, StepMeta
from portalm_backends.cpu.backend import CpuBackend
from portalm_backends.cpu.program import RecordedStep

pytest.importorskip("portalm_backends._cpu")

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
WIDTH, VOCAB, LAYERS, BLOCKS = 64, 100, 3, 12


def make_weights(backend: CpuBackend) -> dict[str, object]:
    torch.manual_seed(0)
    pack = lambda n, k: backend.pack(torch.randn(n, k) / k**0.5)  # noqa: E731
    return {
        "embedding": torch.randn(VOCAB, WIDTH),
        "norm": torch.randn(WIDTH),
        "cos_sin": torch.randn(64, 16),
        "qkv": [pack(128, WIDTH) for _ in range(LAYERS)],
        "out": [pack(WIDTH, 64) for _ in range(LAYERS)],
        "gate_up": [pack(96, WIDTH) for _ in range(LAYERS)],
        "down": [pack(WIDTH, 48) for _ in range(LAYERS)],
        "head": pack(VOCAB, WIDTH),
    }


class Step:
    """A small model; `between` is applied to the hidden state after each layer."""

    def __init__(self, backend: CpuBackend, between=lambda x: x) -> None:
        self.backend = backend
        self.between = between
        self.num_runs = 0

    def __call__(self, weights, kv, inputs: StepInputs):
        self.num_runs += 1
        backend, meta = self.backend, inputs.meta
        residual = backend.embed(inputs.token_ids, weights["embedding"])
        x = backend.rms_norm(residual, weights["norm"], 1e-5)
        for layer in range(LAYERS):
            projected = backend.linear(x, weights["qkv"][layer])
            query, key, value = torch.split(projected, [64, 32, 32], dim=-1)
            query, key = backend.rope(
                query.view(-1, 4, 16),
                key.view(-1, 2, 16),
                meta.positions,
                weights["cos_sin"],
                is_interleaved=False,
            )
            kv = backend.kv_write(kv, layer, key, value.view(-1, 2, 16), meta)
            attended = backend.attend(kv, layer, query, meta, SPEC)
            x = backend.linear(attended.view(-1, 64), weights["out"][layer])
            x, residual = backend.add_rms_norm(x, residual, weights["norm"], 1e-5)
            x = backend.silu_mul(backend.linear(x, weights["gate_up"][layer]))
            x = self.between(backend.linear(x, weights["down"][layer]))
        x = backend.take_rows(x, meta.logits_rows)
        residual = backend.take_rows(residual, meta.logits_rows)
        x, _ = backend.add_rms_norm(x, residual, weights["norm"], 1e-5)
        return kv, backend.sample(backend.logits(x, weights["head"]), inputs.sample)


def make_inputs(backend: CpuBackend, lengths: list[int], start: int = 0) -> StepInputs:
    """Requests of `lengths` query tokens after `start` others, with four blocks of 16 each."""
    total, count = sum(lengths), len(lengths)
    loc = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(start, start + n) for n in lengths]).astype(np.int32)
    table = (1 + np.arange(count * 4).reshape(count, 4)).astype(np.int32)
    owner = np.repeat(np.arange(count), lengths)
    slots = (table[owner, positions // 16] * 16 + positions % 16).astype(np.int32)
    lens = np.array([start + n for n in lengths], np.int32)
    put = backend.to_device
    meta = StepMeta(
        positions=put(positions),
        slot_mapping=put(slots),
        query_start_loc=put(loc),
        seq_lens=put(lens),
        block_table=put(table),
        logits_rows=put(loc[1:] - 1),
        host_query_start_loc=loc,
        host_seq_lens=lens,
        num_decodes=sum(n == 1 for n in lengths),
        max_query_len=max(lengths),
        max_seq_len=int(lens.max()),
    )
    ids = np.random.default_rng(total).integers(0, VOCAB, total).astype(np.int32)
    ones = np.ones(count, np.float32)
    sample = SampleParams(
        temperature=put(0 * ones),
        top_k=put(np.zeros(count, np.int32)),
        top_p=put(ones),
        min_p=put(0 * ones),
        seed=put(np.zeros(count, np.int64)),
        position=put(np.zeros(count, np.int64)),
        is_greedy=True,
        has_filters=False,
        num_logprobs=5,
    )
    return StepInputs(token_ids=put(ids), meta=backend.prepare(meta, [SPEC]), sample=sample)


def make_kv(backend: CpuBackend):
    spec = KVSpec(num_layers=LAYERS, num_kv_heads=2, head_size=16, block_size=16, dtype="float32")
    return backend.kv_alloc(spec, BLOCKS + 1)


SHAPES = [[5], [1], [1, 1, 1], [3, 1], [20, 7], [1]]


def run_all(backend: CpuBackend, step) -> list[torch.Tensor]:
    weights, kv, results = make_weights(backend), make_kv(backend), []
    for lengths in SHAPES:
        kv, out = step(weights, kv, make_inputs(backend, lengths))
        results.append(out.top_logprobs.clone())
    return results


def test_program_equals_the_step_for_all_sizes():
    backend = CpuBackend()
    step = Step(backend)
    expected = run_all(backend, step)
    recorded = RecordedStep(backend, step)
    step.num_runs = 0

    actual = run_all(backend, recorded)

    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert step.num_runs == 1, "the step itself ran again"


def test_other_weights_are_recorded_again():
    backend = CpuBackend()
    step = Step(backend)
    recorded = RecordedStep(backend, step)
    first = run_all(backend, recorded)

    again = run_all(backend, recorded)

    assert step.num_runs == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x * 2, "which no kernel of the step wrote"),
        (lambda x: x.mul_(2), "changes the results of kernels"),
    ],
    ids=["new", "in place"],
)
def test_step_with_torch_computation_runs_call_by_call(caplog, between, reason):
    backend = CpuBackend()
    step = Step(backend, between)
    expected = run_all(backend, step)

    with caplog.at_level(logging.WARNING):
        actual = run_all(backend, RecordedStep(backend, step))

    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert [reason in r.getMessage() for r in caplog.records] == [True], "one warning"


def test_single_row_is_not_recorded():
    backend = CpuBackend()
    step = Step(backend)
    recorded = RecordedStep(backend, step)
    weights, kv = make_weights(backend), make_kv(backend)
    for _ in range(3):
        recorded(weights, kv, make_inputs(backend, [1]))

    assert step.num_runs == 3


def test_results_that_are_alive_at_once_have_separate_slots():
    """Replays repeat the result, so no slot is overwritten while its result is still needed."""
    backend = CpuBackend()
    recorded = RecordedStep(backend, Step(backend))
    weights, kv = make_weights(backend), make_kv(backend)
    inputs = make_inputs(backend, [4, 6])
    _, expected = recorded(weights, kv, inputs)
    for _ in range(2):
        _, actual = recorded(weights, kv, inputs)
        assert torch.equal(actual.top_logprobs, expected.top_logprobs)
        recorded._logits.fill_(float("nan"))


def test_plan_for_another_attention_spec_is_refused():
    backend = CpuBackend()
    other = dataclasses.replace(SPEC, scale=0.5)
    inputs = make_inputs(backend, [4])
    inputs.meta.plan = {}
    backend.prepare(inputs.meta, [other])

    with pytest.raises(Exception, match="not prepared"):
        RecordedStep(backend, Step(backend))(make_weights(backend), make_kv(backend), inputs)
