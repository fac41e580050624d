"""The portable base class: torch defaults, and checks of claims."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from portalm.backend import KV, AttentionSpec, Capabilities, KVSpec, StepMeta, load_backend
from portalm.errors import BackendError, Unsupported
from portalm_backends.portable.backend import TorchBackend
from portalm_backends.portable.rounding import round_to
from portalm_backends.reference.backend import ReferenceBackend

BACKEND = ReferenceBackend()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_backend_must_write_six_methods() -> None:
    assert TorchBackend.__abstractmethods__ == {
        "find", "memory", "kv_bytes_per_block", "_kv_alloc", "kv_write", "attend",
    }  # fmt: skip


# -- layers: the same bits as transformers ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_rounds_where_transformers_rounds(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = random(9, 64, dtype=dtype) * 3, random(64, seed=1, dtype=dtype)
    norm = LlamaRMSNorm(64, eps=1e-5)
    norm.weight.data = weight

    assert torch.equal(BACKEND.rms_norm(x, weight, 1e-5), norm(x).detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_the_norm_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual = random(9, 64, dtype=dtype), random(9, 64, seed=1, dtype=dtype)
    weight = random(64, seed=2, dtype=dtype)

    out, total = BACKEND.add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(total, x + residual)
    assert torch.equal(out, BACKEND.rms_norm(x + residual, weight, 1e-5))


def test_rope_of_halves_equals_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = random(7, 4, 16), random(7, 2, 16, seed=1)
    positions = torch.tensor([3, 0, 9, 9, 1, 31, 2], dtype=torch.int32)
    angles = torch.arange(32)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    cos, sin = (
        torch.cat([x, x], dim=-1)[positions.long()][None] for x in (angles.cos(), angles.sin())
    )

    actual = BACKEND.rope(query, key, positions, table, is_interleaved=False)

    expected = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[0].transpose(0, 1))


def test_rope_leaves_dimensions_after_rotary_dim_unchanged() -> None:
    query, key = random(3, 4, 16), random(3, 2, 16, seed=1)
    table = random(8, 6, seed=2)
    positions = torch.tensor([1, 2, 3], dtype=torch.int32)

    for is_interleaved in (False, True):
        turned, _ = BACKEND.rope(query, key, positions, table, is_interleaved=is_interleaved)

        assert torch.equal(turned[..., 6:], query[..., 6:])
        assert not torch.equal(turned[..., :6], query[..., :6])


def test_logits_of_bfloat16_inputs_are_float32() -> None:
    x, weight = random(3, 64, dtype=torch.bfloat16), random(50, 64, seed=1, dtype=torch.bfloat16)

    logits = BACKEND.logits(x, BACKEND.pack(weight))

    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x.double(), weight.double()).float())


def test_silu_mul_has_the_gate_first() -> None:
    gate_up = torch.tensor([[1.0, -2.0, 3.0, 5.0]])

    expected = torch.tensor([[3 / (1 + np.exp(-1)), -10 / (1 + np.exp(2))]], dtype=torch.float32)
    torch.testing.assert_close(BACKEND.silu_mul(gate_up), expected)


# -- device -----------------------------------------------------------------------------------


def test_the_host_may_reuse_its_array() -> None:
    host = np.arange(4, dtype=np.int32)

    x = BACKEND.to_device(host)
    host[:] = 9

    assert x.dtype == torch.int32
    assert x.tolist() == [0, 1, 2, 3]
    assert BACKEND.to_host(x).done()
    assert BACKEND.to_host(x).result().tolist() == [0, 1, 2, 3]


class Hanging(ReferenceBackend):
    """A device that does not answer until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def device(self) -> torch.device:
        self.released.wait()
        return torch.device("cpu")


class Failing(ReferenceBackend):
    def device(self) -> torch.device:
        raise RuntimeError("double bit error")


def test_a_working_device_passes_the_probe() -> None:
    started = time.monotonic()

    BACKEND.probe(timeout_s=30.0)

    assert time.monotonic() - started < 25  # it answered before the deadline


def test_a_hanging_device_fails_the_probe_by_its_deadline() -> None:
    backend = Hanging()
    started = time.monotonic()

    with pytest.raises(BackendError, match=r"did not answer in 0\.1 s") as caught:
        backend.probe(timeout_s=0.1)

    backend.released.set()
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 10


def test_a_device_error_is_reported_by_the_probe() -> None:
    with pytest.raises(BackendError, match="cannot add two numbers: double bit error"):
        Failing().probe(timeout_s=30.0)


def test_a_sealed_device_refuses_captures() -> None:
    backend = ReferenceBackend()

    def step(weights, kv, inputs):  # type: ignore[no-untyped-def]
        return kv, None

    assert backend.compile(step, None, None) is step
    with backend.seal(), pytest.raises(BackendError, match="sealed"):
        backend.compile(step, None, None)
    assert backend.compile(step, None, None) is step


# -- claims are checked once, by the base class ------------------------------------------------


class Picky(ReferenceBackend):
    """Claims little, and counts the calls that reach it."""

    capabilities = Capabilities(
        dtypes=frozenset({"float32"}),
        kv_dtypes=frozenset({"float32", "int8"}),
        head_sizes=frozenset({8, 16}),
        shared_head_sizes=frozenset({32}),
        shared_kv_dtypes=frozenset({"float32"}),
        block_sizes=frozenset({4}),
        features=frozenset({"shared_values"}),
        quantizations=frozenset({"int8"}),
    )
    num_calls = 0

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        self.num_calls += 1
        return super()._kv_alloc(spec, num_blocks)

    def _pack(self, weight: Any, **options: Any) -> Any:
        self.num_calls += 1
        return weight


class WithoutSharedValues(Picky):
    capabilities = replace(Picky.capabilities, features=frozenset())


CLAIMED = KVSpec(num_layers=1, num_kv_heads=1, head_size=8, block_size=4, dtype="float32")
SHARED = replace(CLAIMED, head_size=32, shares_values=True)


@pytest.mark.parametrize("spec", [CLAIMED, replace(CLAIMED, dtype="int8"), SHARED])
def test_a_claimed_cache_is_allocated(spec: KVSpec) -> None:
    backend = Picky()

    assert backend.kv_alloc(spec, 2) is not None
    assert backend.num_calls == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            replace(CLAIMED, dtype="fp8"),
            "backend 'reference': KV dtype fp8 is not supported; supported: float32, int8: "
            "choose one with --kv-cache-dtype",
        ),
        (
            replace(CLAIMED, block_size=8),
            "block size 8 is not supported; supported: 4: choose one with --block-size",
        ),
        (
            replace(CLAIMED, head_size=32),
            "head size 32 is not supported; supported: 8, 16: use another device",
        ),
        (
            replace(SHARED, head_size=8),
            "head size 8 is not supported where values are part of their keys; supported: 32",
        ),
        (
            replace(SHARED, dtype="int8"),
            "KV dtype int8 is not supported where values are part of their keys; supported: "
            "float32: choose",
        ),
    ],
)
def test_an_unclaimed_cache_is_refused(spec: KVSpec, message: str) -> None:
    backend = Picky()

    with pytest.raises(Unsupported, match=re.escape(message)):
        backend.kv_alloc(spec, 2)

    assert backend.num_calls == 0


def test_shared_values_are_refused_where_they_are_not_claimed() -> None:
    with pytest.raises(Unsupported, match="values that are part of their keys are not supported"):
        WithoutSharedValues().kv_alloc(SHARED, 2)


def test_an_unclaimed_quantization_is_refused() -> None:
    backend, weight = Picky(), torch.ones(2, 32)
    message = "int4 weights are not supported; supported: int8: choose one with --quantization"

    for refused, options in (
        (weight, {"quantization": "int4"}),
        (round_to(weight, "int4"), {}),
        (round_to(weight, "int8"), {"quantization": "int4"}),
    ):
        with pytest.raises(Unsupported, match=message):
            backend.pack(refused, **options)
    assert backend.num_calls == 0

    backend.pack(weight)
    backend.pack(weight, quantization="int8")
    backend.pack(round_to(weight, "int8"))
    assert backend.num_calls == 3


@pytest.mark.parametrize("device", ["cpu", "null", "reference"])
def test_every_backend_refuses_what_it_does_not_claim(device: str) -> None:
    backend = load_backend(device)

    with pytest.raises(Unsupported, match="float8_e5m2 is not supported"):
        backend.kv_alloc(replace(CLAIMED, head_size=16, dtype="float8_e5m2"), 2)
    with pytest.raises(Unsupported, match="int3 weights are not supported"):
        backend.pack(torch.ones(2, 32), quantization="int3")


# -- the reference's cache and attention ------------------------------------------------------

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_size=4, block_size=4, dtype="float32")


def test_a_wire_of_another_dtype_is_converted() -> None:
    kv = BACKEND.kv_alloc(SPEC, 6)
    blocks = torch.tensor([3, 1], dtype=torch.int32)
    wire = random(2, 2, 2, 4, 2, 4, dtype=torch.bfloat16)

    kv = BACKEND.kv_import(kv, blocks, wire)

    assert torch.equal(BACKEND.kv_export(kv, blocks), wire.float())


def test_a_cache_beyond_all_memory_is_an_error_of_kind_oom() -> None:
    with pytest.raises(
        BackendError, match=r"\d+ MiB \(.*memory.*--kv-cache-memory-bytes"
    ) as caught:
        BACKEND.kv_alloc(SPEC, 1 << 46)

    assert caught.value.kind == "oom"


def test_bytes_per_block_is_what_is_allocated() -> None:
    kv = BACKEND.kv_alloc(SPEC, 7)

    assert BACKEND.kv_bytes_per_block(SPEC) * 7 == kv.numel() * kv.element_size()


def test_slots_before_the_window_are_not_read() -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=4, scale=0.5, sliding_window=3)
    kv = BACKEND.kv_alloc(SPEC, 4)
    kv[:, :, 1:] = random(2, 2, 3, 4, 2, 4)
    meta = StepMeta(
        positions=torch.tensor([8, 9], dtype=torch.int32),
        slot_mapping=torch.tensor([12, 13], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 2], dtype=torch.int32),
        seq_lens=torch.tensor([10], dtype=torch.int32),
        block_table=torch.tensor([[1, 2, 3]], dtype=torch.int32),
        logits_rows=torch.tensor([1], dtype=torch.int32),
        host_query_start_loc=np.array([0, 2], np.int32),
        host_seq_lens=np.array([10], np.int32),
        num_decodes=0,
        max_query_len=2,
        max_seq_len=10,
    )
    query = random(2, 2, 4, seed=1)
    before = BACKEND.attend(kv, 0, query, meta, spec)

    kv[:, :, 0] = float("nan")
    kv[:, :, 1] = float("nan")
    kv[:, :, 2, :2] = float("nan")  # positions 4 and 5; the first query attends to 6, 7 and 8

    assert torch.equal(BACKEND.attend(kv, 0, query, meta, spec), before)
    assert torch.isfinite(before).all()
