"""Attention kernels at the shapes of the 8B model: decodes, prompts, and writes to the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.common import Clock, Settings, report, run_sections, settings
from gpu.timing import copies, seconds
from portalm.backend import AttentionSpec, KVSpec, StepMeta, load_backend


def attention_meta(
    backend: Any, spec: AttentionSpec, lengths: list[int], contexts: list[int], block: int = 16
) -> StepMeta:
    """A step with `lengths` new tokens per request, whose contexts have `contexts` tokens."""
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


class Attention:
    """The sections of this part."""

    def __init__(self, run: Settings) -> None:
        """Start the backend, twice if it has native kernels: once without them."""
        self.run = run
        self.backend: Any = load_backend(run.device)
        self.providers: dict[str, Any] = {"": self.backend}
        if getattr(self.backend, "_native", None) is not None:
            in_triton: Any = load_backend(run.device)
            in_triton._native = None
            self.providers = {"": self.backend, ", Triton only": in_triton}
        self.dtype = torch.float32 if run.is_tiny else torch.bfloat16
        model = run.model("8b")
        self.heads: int = model["num_attention_heads"]
        self.kv_heads: int = model["num_key_value_heads"]
        self.size: int = model["head_dim"]
        self.spec = AttentionSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.size,
            scale=self.size**-0.5,
        )

    def cache(self, num_blocks: int, block: int, dtype: str, most: int = 64) -> tuple[Any, int]:
        """A cache of normal values, and its number of layers, over which measurements rotate."""
        one = KVSpec(
            num_layers=1,
            num_kv_heads=self.kv_heads,
            head_size=self.size,
            block_size=block,
            dtype=dtype,
        )
        num_bytes = self.backend.kv_bytes_per_block(one) * num_blocks
        layers = min(copies(num_bytes, is_tiny=self.run.is_tiny), most)
        spec = KVSpec(
            num_layers=layers,
            num_kv_heads=self.kv_heads,
            head_size=self.size,
            block_size=block,
            dtype=dtype,
        )
        kv = self.backend.kv_alloc(spec, num_blocks)
        key = self.normal(num_blocks * block, self.kv_heads)
        slots = np.arange(num_blocks * block, dtype=np.int32)
        meta = attention_meta(self.backend, self.spec, [1], [1], block)
        meta.slot_mapping = self.backend.to_device(slots)
        for layer in range(layers):
            kv = self.backend.kv_write(kv, layer, key, key, meta)
        return kv, layers

    def normal(self, *shape: int) -> torch.Tensor:
        """Normal values [*shape, D] on the device."""
        return torch.randn(*shape, self.size, device=self.backend.device()).to(self.dtype)

    def decode(self, clock: Clock) -> None:
        """Measure decodes in bytes of keys and values per second."""
        name = str(self.dtype).removeprefix("torch.")
        cases = [(64, 1024), (256, 1024), (64, 8192), (8, 8192), (1, 8192), (1, 1024)]
        kinds = [(16, name), (64, name), (16, "fp8"), (64, "fp8"), (16, "int8")]
        for block, dtype in kinds if not self.run.is_tiny else [(16, name), (16, "fp8")]:
            if dtype not in self.backend.capabilities.kv_dtypes:
                report(f"decode attention, {dtype}", None, message="not supported here")
                continue
            for count, context in cases if not self.run.is_tiny else [(2, 40)]:
                self._decode(count, context, block, dtype)

    def _decode(self, count: int, context: int, block: int, dtype: str) -> None:
        kv, layers = self.cache(1 + count * -(-context // block), block, dtype)
        query = self.normal(count, self.heads)
        spec = KVSpec(
            num_layers=1,
            num_kv_heads=self.kv_heads,
            head_size=self.size,
            block_size=block,
            dtype=dtype,
        )
        num_bytes = count * context * self.backend.kv_bytes_per_block(spec) / block
        num_bytes += 2 * query.numel() * query.element_size()
        is_plain = block == 16 and dtype in ("bfloat16", "float32")
        kind = "" if is_plain else f", {dtype}, blocks of {block}"
        for provider, backend in self.providers.items():
            meta = attention_meta(backend, self.spec, [1] * count, [context] * count, block)
            works = [
                partial(backend.attend, kv, layer, query, meta, self.spec)
                for layer in range(layers)
            ]
            taken = seconds(backend, works)
            label = f"decode attention, {count} x {context}{kind}{provider}"
            report(label, num_bytes / taken / 1e12, "TB/s", us=taken * 1e6)

    def prefill(self, clock: Clock) -> None:
        """Measure prompts, and torch's attention by the name of its kernels."""
        name = str(self.dtype).removeprefix("torch.")
        for length in (2048, 8192) if not self.run.is_tiny else (48,):
            kv, layers = self.cache(1 + -(-length // 16), 16, name, most=4)
            meta = attention_meta(self.backend, self.spec, [length], [length])
            query = self.normal(length, self.heads)
            flops = 2 * length * length * self.heads * self.size  # half of the scores are masked
            works = [
                partial(self.backend.attend, kv, layer, query, meta, self.spec)
                for layer in range(layers)
            ]
            ours = seconds(self.backend, works)
            report(f"prefill attention, {length}", flops / ours / 1e12, "TFLOP/s", us=ours * 1e6)
            q = query.transpose(0, 1)[None].contiguous()
            k, v = (self.normal(1, self.heads, length) for _ in range(2))
            for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                label = f"prefill attention in torch, {kind.name}, {length}"

                def theirs(
                    q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v
                ) -> torch.Tensor:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                try:
                    with sdpa_kernel(kind):
                        taken = seconds(self.backend, [theirs])
                except RuntimeError as error:
                    report(label, None, message=f"not available here: {error}")
                    continue
                report(label, flops / taken / 1e12, "TFLOP/s", us=taken * 1e6, ours=taken / ours)

    def writes(self, clock: Clock) -> None:
        """Measure rotating and writing keys."""
        name = str(self.dtype).removeprefix("torch.")
        longest = self.run.scaled(8192, 48)
        for dtype in (name, "fp8"):
            if dtype not in self.backend.capabilities.kv_dtypes:
                continue
            kv, layers = self.cache(1 + -(-longest // 16), 16, dtype, most=8)
            table = torch.randn(longest, self.size, device=self.backend.device())
            for tokens in (1, 256, longest) if not self.run.is_tiny else (1, longest):
                meta = attention_meta(self.backend, self.spec, [tokens], [tokens])
                query = self.normal(tokens, self.heads)
                key, value = (self.normal(tokens, self.kv_heads) for _ in range(2))
                for provider, backend in self.providers.items():
                    works = [
                        partial(
                            backend.rope_kv_write,
                            kv,
                            layer,
                            query,
                            key,
                            value,
                            meta,
                            table,
                            is_interleaved=False,
                        )
                        for layer in range(layers)
                    ]
                    taken = seconds(backend, works)
                    report(f"rope_kv_write, {tokens} tokens, {dtype}{provider}", taken * 1e6, "us")


def main() -> None:
    """Measure the selected sections."""
    run = settings()
    part = Attention(run)
    run_sections(run, {"decode": part.decode, "prefill": part.prefill, "cache writes": part.writes})


if __name__ == "__main__":
    main()
