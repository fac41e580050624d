"""Self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import KV, AttentionSpec, Backend, StepMeta
from portalm.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: merged query, key and value projection, rotation, cache, output."""

    layer: int
    spec: AttentionSpec
    qkv: Linear
    """Query, key and value rows, in this order: N = (H + 2 H_kv) D."""
    out: Linear
    is_interleaved: bool = False
    """How rotary pairs lie."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """x [T, C], already normed -> (cache with this step's keys and values, [T, C])."""
        spec = self.spec
        num_tokens = x.shape[0]
        query_size, kv_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        projected = self.qkv(backend, x)  # [T, (H + 2 H_kv) D]
        query, key, value = torch.split(projected, [query_size, kv_size, kv_size], dim=-1)
        query, key = backend.rope(
            query.view(num_tokens, spec.num_heads, spec.head_size),
            key.view(num_tokens, spec.num_kv_heads, spec.head_size),
            meta.positions,
            cos_sin,
            is_interleaved=self.is_interleaved,
        )
        value = value.view(num_tokens, spec.num_kv_heads, spec.head_size)
        kv = backend.kv_write(kv, self.layer, key, value, meta)
        attended = backend.attend(kv, self.layer, query, meta, spec)  # [T, H, D]
        return kv, self.out(backend, attended.view(num_tokens, query_size))
