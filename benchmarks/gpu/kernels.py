"""Each kernel at the shapes of the 8B model, in bytes or operations per second."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpu.common import Settings, report, seconds, settings
from portalm.backend import AttentionSpec, Experts, KVSpec, SampleParams, StepMeta, load_backend


def attention_meta(backend: Any, spec: Any, lengths: list[int], contexts: list[int]) -> StepMeta:
    """A step with `lengths` new tokens per request, whose contexts have `contexts` tokens."""
    block = 16
    blocks = -(-max(contexts) // block)
    table = 1 + np.arange(len(lengths) * blocks, dtype=np.int32).reshape(len(lengths), blocks)
    loc = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate(
        [np.arange(c - n, c) for n, c in zip(lengths, contexts, strict=True)]
    ).astype(np.int32)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    slots = (table[owner, positions // block] * block + positions % block).astype(np.int32)
    put = backend.to_device
    seq_lens = np.array(contexts, np.int32)
    meta = StepMeta(
        positions=put(positions),
        slot_mapping=put(slots),
        query_start_loc=put(loc),
        seq_lens=put(seq_lens),
        block_table=put(table),
        logits_rows=put(loc[1:] - 1),
        host_query_start_loc=loc,
        host_seq_lens=seq_lens,
        num_decodes=lengths.count(1),
        max_query_len=max(lengths),
        max_seq_len=max(contexts),
    )
    return backend.prepare(meta, [spec])


def attention(backend: Any, run: Settings, dtype: torch.dtype) -> None:
    """Measure decodes in bytes per second, and a prompt compared with torch's attention."""
    model = run.model("8b")
    heads, kv_heads, size = (
        model["num_attention_heads"],
        model["num_key_value_heads"],
        model["head_dim"],
    )
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5)
    name = str(dtype).removeprefix("torch.")
    kv_spec = KVSpec(num_layers=1, num_kv_heads=kv_heads, head_size=size, block_size=16, dtype=name)
    cases = [(64, 1024), (256, 1024), (64, 8192), (8, 8192), (1, 8192)]
    for count, context in cases if not run.is_tiny else [(2, 40)]:
        kv = backend.kv_alloc(kv_spec, 1 + count * -(-context // 16))
        kv.normal_()
        meta = attention_meta(backend, spec, [1] * count, [context] * count)
        query = torch.randn(count, heads, size, device=backend.device()).to(dtype)
        taken = seconds(backend, partial(backend.attend, kv, 0, query, meta, spec))
        num_bytes = 2 * count * context * kv_heads * size * dtype.itemsize
        report(f"decode attention, {count} x {context}", num_bytes / taken / 1e12, "TB/s")
        # if the native kernel was measured, measure the Triton kernel, too
        if getattr(meta.plan.get(spec), "native_items", None) is not None:
            from portalm_backends.gpu_common.attention import attend

            plan = meta.plan[spec]
            alone = partial(attend, kv[0], query, meta, spec, plan, family=backend._family)
            taken = seconds(backend, alone)
            label = f"decode attention in Triton, {count} x {context}"
            report(label, num_bytes / taken / 1e12, "TB/s")
    length = run.scaled(8192, 48)
    kv = backend.kv_alloc(kv_spec, 1 + -(-length // 16))
    kv.normal_()
    meta = attention_meta(backend, spec, [length], [length])
    query = torch.randn(length, heads, size, device=backend.device()).to(dtype)
    key, value = (query[:, :kv_heads].clone() for _ in range(2))
    ours = seconds(backend, lambda: backend.attend(kv, 0, query, meta, spec), times=10)
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, key, value))
    theirs = seconds(
        backend,
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        times=10,
    )
    flops = 2 * length * length * heads * size
    report(f"prefill attention, {length}", flops / ours / 1e12, "TFLOP/s", of_torch=theirs / ours)
    table = torch.randn(length, size, device=backend.device())
    for tokens in (run.scaled(256, 8), length):
        rows = attention_meta(backend, spec, [tokens], [tokens])
        parts = (x[:tokens] for x in (query, key, value))
        write = partial(backend.rope_kv_write, kv, 0, *parts, rows, table, is_interleaved=False)
        taken = seconds(backend, write)
        num_bytes = 2 * tokens * (heads + 2 * kv_heads) * size * dtype.itemsize
        report(
            f"rope_kv_write, {tokens} tokens", taken * 1e6, "us", tbytes=num_bytes / taken / 1e12
        )


def linears(backend: Any, run: Settings, dtype: torch.dtype) -> None:
    """Measure the linear layers of the 8B model."""
    model = run.model("8b")
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    kv = 2 * model["num_key_value_heads"] * model["head_dim"]
    shapes = {
        "qkv": (model["num_attention_heads"] * model["head_dim"] + kv, hidden),
        "out": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    formats = [None, "int4_min", "int8"] if not run.is_tiny else [None]
    for name, (n, k) in shapes.items():
        weight = torch.randn(n, k, device=backend.device()).to(dtype)
        for quantization in formats:
            packed = backend.pack(weight, quantization=quantization)
            for rows in (1, 16, 64, 256, 2048) if not run.is_tiny else (2,):
                x = torch.randn(rows, k, device=backend.device()).to(dtype)
                taken = seconds(backend, partial(backend.linear, x, packed))
                label = f"{name}, {quantization or dtype}, {rows} rows"
                tflops = 2 * rows * n * k / taken / 1e12
                report(label, taken * 1e6, "us", tflops=tflops, tbytes=n * k * 2 / taken / 1e12)


def experts(backend: Any, run: Settings, dtype: torch.dtype) -> None:
    """Measure the experts of a Qwen3-30B-A3B layer: bytes of chosen experts, or operations."""
    count, top_k = run.scaled(128, 4), run.scaled(8, 2)
    hidden, inner = run.scaled(2048, 64), run.scaled(768, 32)
    device = backend.device()

    def packed(rows: int, columns: int) -> tuple[Any, ...]:
        many = (torch.randn(rows, columns, device=device) * columns**-0.5 for _ in range(count))
        return tuple(backend.pack(weight.to(dtype)) for weight in many)

    layer = Experts(gate_up=packed(2 * inner, hidden), down=packed(hidden, inner))
    numbers = 3 * inner * hidden
    for tokens in (1, 16, 64, 256, 2048, 8192) if not run.is_tiny else (2, 9):
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        shares, ids = torch.rand(tokens, count, device=device).topk(top_k, dim=-1)
        num_chosen = len(ids.unique())
        taken = seconds(backend, partial(backend.moe, x, ids.int(), shares, layer))
        tbytes = num_chosen * numbers * dtype.itemsize / taken / 1e12
        tflops = 2 * tokens * top_k * numbers / taken / 1e12
        if tokens <= 256:
            report(f"experts, {tokens} tokens", tbytes, "TB/s", us=taken * 1e6, tflops=tflops)
        else:
            report(f"experts, {tokens} tokens", tflops, "TFLOP/s", us=taken * 1e6, tbytes=tbytes)


def small_operations(backend: Any, run: Settings, dtype: torch.dtype) -> None:
    """Measure the norm, the activation, the logits and sampling."""
    model, device = run.model("8b"), backend.device()
    rows, hidden = run.scaled(256, 4), model["hidden_size"]
    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device).to(dtype)
    taken = seconds(backend, lambda: backend.add_rms_norm(x, residual, weight, 1e-5))
    report(f"add_rms_norm, {rows} rows", taken * 1e6, "us")
    gate_up = torch.randn(rows, 2 * model["intermediate_size"], device=device).to(dtype)
    taken = seconds(backend, lambda: backend.silu_mul(gate_up))
    report(f"silu_mul, {rows} rows", taken * 1e6, "us")
    vocab = model["vocab_size"]
    head = backend.pack(torch.randn(vocab, hidden).to(dtype), for_logits=True)
    taken = seconds(backend, lambda: backend.logits(x, head))
    report(f"logits, {rows} rows", taken * 1e6, "us")
    logits = torch.randn(rows, vocab, device=device)

    def column(value: float, kind: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=kind, device=device)

    for label, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 1.0, 0, 1.0),
        ("top_k and top_p", 1.0, 50, 0.9),
    ):
        params = SampleParams(
            temperature=column(temperature, torch.float32),
            top_k=column(top_k, torch.int32),
            top_p=column(top_p, torch.float32),
            min_p=column(0.0, torch.float32),
            seed=column(1, torch.int64),
            position=column(7, torch.int64),
            is_greedy=False,
            has_filters=True,
        )
        taken = seconds(backend, partial(backend.sample, logits, params))
        report(
            f"sample, {label}, {rows} rows",
            taken * 1e6,
            "us",
            tbytes=rows * vocab * 4 / taken / 1e12,
        )
        if getattr(backend, "_native", None) is not None:
            from portalm_backends.gpu_common.kernels import sampling

            taken = seconds(backend, partial(sampling.sample, logits, params))
            report(f"sample in Triton, {label}, {rows} rows", taken * 1e6, "us")


def main() -> None:
    """Measure all kernels."""
    run = settings()
    backend = load_backend(run.device)
    dtype = torch.float32 if run.is_tiny else torch.bfloat16
    for part in (attention, small_operations, experts, linears):
        try:
            part(backend, run, dtype)
        except Exception as error:  # a failed part must not hide the results of the others
            report(f"FAILED {part.__name__}", None, message=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
