"""Self-attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from portalm.backend import KV, AttentionSpec, Backend, StepMeta
from portalm.layers.linear import Linear

HeadNorm = Callable[[Backend, torch.Tensor], torch.Tensor]
"""A norm of [T, H, D], or of [T, H D]."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: merged query, key and value projection, rotation, cache, output."""

    layer: int
    spec: AttentionSpec
    qkv: Linear
    """Query, key and value rows, in this order: N = (H + 2 H_kv) D."""
    out: Linear
    rope: int | None = 0
    """Which of the model's rotations turns query and key; None: none does."""
    is_interleaved: bool = False
    """How rotary pairs lie: (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ..."""
    query_norm: HeadNorm | None = None
    """Before the rotation, over each head; None: none."""
    key_norm: HeadNorm | None = None
    norms_whole: bool = False
    """The two norms go over all heads of a token at once."""
    sinks: torch.Tensor | None = None
    """float32 [H] where the spec has them."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """x [T, C], already normed -> (cache with this step's keys and values, [T, C]).

        `ropes` are the model's tables of cosines and sines, float32 [max_position, rotary_dim].
        """
        spec = self.spec
        num_tokens = x.shape[0]
        query_size, kv_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        projected = self.qkv(backend, x)  # [T, (H + 2 H_kv) D]
        query, key, value = torch.split(projected, [query_size, kv_size, kv_size], dim=-1)
        query = self._normed(backend, query, self.query_norm, spec.num_heads)  # [T, H, D]
        key = self._normed(backend, key, self.key_norm, spec.num_kv_heads)
        value = value.view(num_tokens, spec.num_kv_heads, spec.head_size)
        if self.rope is None:
            kv = backend.kv_write(kv, self.layer, key, value, meta)
        else:
            table, is_interleaved = ropes[self.rope], self.is_interleaved
            kv, query = backend.rope_kv_write(
                kv, self.layer, query, key, value, meta, table, is_interleaved=is_interleaved
            )
        attended = backend.attend(kv, self.layer, query, meta, spec, self.sinks)  # [T, H, D]
        return kv, self.out(backend, attended.view(num_tokens, query_size))

    def _normed(
        self, backend: Backend, x: torch.Tensor, norm: HeadNorm | None, num_heads: int
    ) -> torch.Tensor:
        """x [T, H D] as [T, H, D], normed where there is a norm for it."""
        heads = (x.shape[0], num_heads, self.spec.head_size)
        if norm is None:
            return x.view(heads)
        if self.norms_whole:
            return norm(backend, x).view(heads)
        return norm(backend, x.view(heads))
