"""Measure experts and latent attention on the CPU, as shares of the machine's limit.

    PYTHONPATH=benchmarks python benchmarks/kernels/layers.py [--layers qwen3,latent] [--json FILE]

The limit of an operation is the longer of two times: reading once what it must read (weights of
the selected experts, keys of the context), and doing its multiply-adds, at the bandwidth and the
rate that peers/ceilings.c measures right before and after it. The limit of a layer is the sum
over its operations: experts are one, latent attention is two, projections and attention itself.
Tokens choose experts at random.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear import median_s
from peers import ceilings

from portalm.backend import AttentionSpec, Backend, Experts, KVSpec, StepMeta, load_backend
from portalm.layers.latent_attention import LatentAttention
from portalm.layers.linear import Linear
from portalm.layers.norms import RMSNorm

_DTYPE = torch.bfloat16
_CACHE = Path("~/.cache/portalm/bench").expanduser()


@dataclass(frozen=True, slots=True)
class Mixture:
    """E experts of width I on vectors of size C, k experts per token."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int


MIXTURES = {
    "mixtral": Mixture(8, 2, 4096, 14336),
    "qwen3": Mixture(128, 8, 2048, 768),
    "deepseek": Mixture(64, 6, 2048, 1408),
}
HEADS, RANK, ROTARY, PLAIN, VALUE, HIDDEN = 16, 512, 64, 128, 128, 2048
"""DeepSeek-V2-Lite's attention."""
CONTEXT, BLOCK = 1024, 16


@dataclass(frozen=True, slots=True)
class Work:
    """A call and its minimal work."""

    call: Callable[[], object]
    parts: tuple[tuple[float, float], ...]
    """For each operation: bytes to read, and operations (a multiply-add is two)."""

    @property
    def read_bytes(self) -> float:
        """Sum over all operations."""
        return sum(read for read, _ in self.parts)

    @property
    def operations(self) -> float:
        """Sum over all operations."""
        return sum(operations for _, operations in self.parts)


def mixture(backend: Backend, shape: Mixture) -> Callable[[int], Work]:
    """Return the function from a number of tokens to the call of an expert layer."""
    hidden, inner = shape.hidden, shape.inner
    wide = torch.randn(2 * inner, hidden).div_(hidden**0.5).to(_DTYPE)
    narrow = torch.randn(hidden, inner).div_(inner**0.5).to(_DTYPE)
    experts = Experts(  # equal values in separate memory
        gate_up=tuple(backend.pack(wide) for _ in range(shape.num_experts)),
        down=tuple(backend.pack(narrow) for _ in range(shape.num_experts)),
    )

    def work(num_tokens: int) -> Work:
        x = torch.randn(num_tokens, hidden).to(_DTYPE)
        rng, k = np.random.default_rng(num_tokens), shape.top_k
        choices = [  # different experts in each call, so that they are not in the CPU cache
            np.stack([rng.permutation(shape.num_experts)[:k] for _ in range(num_tokens)])
            for _ in range(8)
        ]
        ids = [torch.from_numpy(choice.astype(np.int32)) for choice in choices]
        shares = torch.full((num_tokens, k), 1 / k)
        turn = 0

        def call() -> None:
            nonlocal turn
            turn = (turn + 1) % len(ids)
            backend.moe(x, ids[turn], shares, experts)

        weights = 3 * hidden * inner
        chosen = statistics.mean(len(np.unique(choice)) for choice in choices)
        return Work(call, ((chosen * weights * 2, 2 * num_tokens * k * weights),))

    return work


def latent(backend: Backend) -> Callable[[int], Work]:
    """Return the function from a number of tokens to the call of latent attention.

    The tokens are decodes of that many requests; 512 is one prompt.
    """

    def linear(n: int, k: int) -> Linear:
        return Linear(backend.pack(torch.randn(n, k).div_(k**0.5).to(_DTYPE)))

    def heads(n: int, k: int) -> Any:
        return backend.pack_heads(torch.randn(HEADS, n, k).div_(k**0.5).to(_DTYPE))

    spec = AttentionSpec(
        num_heads=HEADS, num_kv_heads=1, head_size=RANK + ROTARY, value_size=RANK,
        scale=(PLAIN + ROTARY) ** -0.5,
    )  # fmt: skip
    layers = [
        LatentAttention(
            layer=0,
            spec=spec,
            rotary_dim=ROTARY,
            down=linear(RANK + ROTARY, HIDDEN),
            query=linear(HEADS * (PLAIN + ROTARY), HIDDEN),
            query_norm=None,
            latent_norm=RMSNorm(torch.ones(RANK, dtype=_DTYPE), 1e-6),
            key_heads=heads(RANK, PLAIN),
            value_heads=heads(VALUE, RANK),
            out=linear(HIDDEN, HEADS * VALUE),
            is_interleaved=True,
        )
        for _ in range(8)  # so that their weights are not in the CPU cache
    ]
    weights = (RANK + ROTARY) * HIDDEN + HEADS * (PLAIN + ROTARY) * HIDDEN
    weights += HEADS * RANK * (PLAIN + VALUE) + HIDDEN * HEADS * VALUE
    angles = torch.arange(CONTEXT)[:, None] * 0.01 * torch.ones(ROTARY // 2)
    ropes = [torch.cat((angles.cos(), angles.sin()), dim=-1)]

    def work(num_tokens: int) -> Work:
        is_prompt = num_tokens == 512
        num_requests = 1 if is_prompt else num_tokens
        length = num_tokens if is_prompt else CONTEXT
        meta, num_blocks = step(num_requests, num_tokens // num_requests, length)
        backend.prepare(meta, [spec])
        kv = backend.kv_alloc(
            KVSpec(num_layers=1, num_kv_heads=1, head_size=RANK + ROTARY, block_size=BLOCK,
                   dtype="bfloat16", shares_values=True),
            num_blocks,
        )  # fmt: skip
        wire = torch.randn(num_blocks, 1, 1, BLOCK, 1, RANK + ROTARY).to(_DTYPE)
        kv = backend.kv_import(kv, torch.arange(num_blocks, dtype=torch.int32), wire)
        x = torch.randn(num_tokens, HIDDEN).to(_DTYPE)
        turn = 0

        def call() -> None:
            nonlocal turn
            turn = (turn + 1) % len(layers)
            layers[turn](backend, kv, x, ropes, meta)

        seen = num_tokens * (num_tokens + 1) / 2 if is_prompt else num_tokens * CONTEXT
        attention = 2 * HEADS * (2 * RANK + ROTARY) * seen
        keys = num_requests * length * (RANK + ROTARY) * 2
        return Work(call, ((weights * 2, 2 * num_tokens * weights), (keys, attention)))

    return work


def step(num_requests: int, query_len: int, length: int) -> tuple[StepMeta, int]:
    """Describe `query_len` new tokens per request at the end of `length` tokens of context."""
    blocks = -(-length // BLOCK)
    table = np.arange(num_requests * blocks, dtype=np.int32).reshape(num_requests, blocks) + 1
    positions = np.tile(np.arange(length - query_len, length, dtype=np.int32), num_requests)
    request = np.repeat(np.arange(num_requests), query_len)
    slots = table[request, positions // BLOCK] * BLOCK + positions % BLOCK
    loc = np.arange(num_requests + 1, dtype=np.int32) * query_len
    lens = np.full(num_requests, length, np.int32)
    tensors = (torch.from_numpy(x.astype(np.int32)) for x in (positions, slots, loc, lens, table))
    positions_t, slots_t, loc_t, lens_t, table_t = tensors
    meta = StepMeta(
        positions=positions_t,
        slot_mapping=slots_t,
        query_start_loc=loc_t,
        seq_lens=lens_t,
        block_table=table_t,
        logits_rows=loc_t[1:] - 1,
        host_query_start_loc=loc,
        host_seq_lens=lens,
        num_decodes=num_requests if query_len == 1 else 0,
        max_query_len=query_len,
        max_seq_len=length,
    )
    return meta, int(table.max()) + 1


def measure(
    name: str, num_tokens: int, work: Work, program: Path, seconds: float
) -> dict[str, Any]:
    """Measure one row: the limit from ceilings before and after the call, and the share reached."""
    read_bytes = int(max(work.read_bytes, 256 << 20))  # more than any cache holds
    before = ceilings.measure_bytes(program, read_bytes, "bf16")
    taken_s = median_s(work.call, seconds=seconds)
    behind = ceilings.measure_bytes(program, read_bytes, "bf16")
    read_bytes_s = (before.read_bytes_s + behind.read_bytes_s) / 2
    flops_s = (before.flops_s + behind.flops_s) / 2
    limit_s = sum(max(read / read_bytes_s, count / flops_s) for read, count in work.parts)
    row = {
        "layer": name,
        "tokens": num_tokens,
        "ms": taken_s * 1e3,
        "limit_ms": limit_s * 1e3,
        "share": limit_s / taken_s,
        "read_gb_s": work.read_bytes / taken_s / 1e9,
        "gflop_s": work.operations / taken_s / 1e9,
        "ceiling_gb_s": read_bytes_s / 1e9,
        "ceiling_gflop_s": flops_s / 1e9,
    }
    print(
        f"{name:9s} {num_tokens:4d} tokens {row['ms']:9.2f} ms  {row['share']:5.2f} of the limit  "
        f"{row['read_gb_s']:6.1f} of {row['ceiling_gb_s']:5.1f} GB/s  "
        f"{row['gflop_s']:6.1f} of {row['ceiling_gflop_s']:6.1f} GFLOP/s",
        flush=True,
    )
    return row


def main() -> None:
    """Print a line for each layer and number of tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default=",".join((*MIXTURES, "latent")))
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of calls for each row")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(
        1
    )  # as in the server's engine process, whose only threads are the kernels' own
    backend, program = load_backend("cpu"), ceilings.build(_CACHE)
    rows = []
    for name in args.layers.split(","):
        make = latent(backend) if name == "latent" else mixture(backend, MIXTURES[name])
        rows += [
            measure(name, num_tokens, make(num_tokens), program, args.seconds)
            for num_tokens in map(int, args.tokens.split(","))
        ]
        del make  # free the weights before the next layer's are created
    if args.json:
        about = {
            "what": "experts and latent attention as shares of what the machine's bandwidth and "
            "multiply-adds allow, bfloat16 weights",
            "date": datetime.date.today().isoformat(),
            "machine": platform.machine(),
            "cpu": type(backend).find().summary,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
