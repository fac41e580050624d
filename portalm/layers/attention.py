"""Self-attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from portalm.backend import KV, AttentionSpec, Backend, StepMeta
from portalm.layers.linear import Linear

HeadNorm = Callable[[Backend, torch.Tensor], torch.Tensor]
"""Normalizes [T, H, D], or [T, H D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionScale:
    """A factor of queries that grows with position: 1 + beta log(1 + floor(position / length))."""

    beta: float
    length: int
    """Positions below this have the factor 1."""

    def __call__(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scale query [T, H, D] by positions int32 [T]."""
        steps = torch.div(positions, self.length, rounding_mode="floor").float()
        factors = 1.0 + self.beta * torch.log1p(steps)
        return query * factors.to(query.dtype)[:, None, None]


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer: merged QKV projection, rotary embedding, KV cache, output."""

    layer: int
    spec: AttentionSpec
    qkv: Linear
    """Query, key and value rows in this order: N = (H + 2 H_kv) D."""
    out: Linear
    rope: int | None = 0
    """Index of the rotary table in `ropes`; None: no rotary embedding."""
    is_interleaved: bool = False
    """Rotary pairs are (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ..."""
    query_norm: HeadNorm | None = None
    """Applied to each query head before the rotary embedding; None: no norm."""
    key_norm: HeadNorm | None = None
    """The same for key heads."""
    norms_all_heads: bool = False
    """The two norms take all heads of a token as one vector."""
    norms_after_rope: bool = False
    """The two norms, of each head, are applied after the rotary embedding."""
    query_scale: PositionScale | None = None
    """Scales queries after the rotary embedding; None: no scale."""
    sinks: torch.Tensor | None = None
    """float32 [H] if `spec.has_sinks`."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Write this step's keys and values to the cache and attend.

        Args:
            backend: computes.
            kv: KV cache.
            x: [T, C], already normalized.
            ropes: the model's cosine and sine tables, float32 [max_position, rotary_dim] each.
            meta: the step.

        Returns:
            The cache, and the attention output [T, C].
        """
        spec = self.spec
        num_tokens = x.shape[0]
        query_size, kv_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        projected = self.qkv(backend, x)  # [T, (H + 2 H_kv) D]
        query, key, value = torch.split(projected, [query_size, kv_size, kv_size], dim=-1)
        norms = (None, None) if self.norms_after_rope else (self.query_norm, self.key_norm)
        query = self._normalized(backend, query, norms[0], spec.num_heads)  # [T, H, D]
        key = self._normalized(backend, key, norms[1], spec.num_kv_heads)
        value = value.view(num_tokens, spec.num_kv_heads, spec.head_size)
        if self.norms_after_rope:
            query, key = self._rotated_and_normalized(backend, query, key, ropes, meta)
            kv = backend.kv_write(kv, self.layer, key, value, meta)
        elif self.rope is None:
            kv = backend.kv_write(kv, self.layer, key, value, meta)
        else:
            table, is_interleaved = ropes[self.rope], self.is_interleaved
            kv, query = backend.rope_kv_write(
                kv, self.layer, query, key, value, meta, table, is_interleaved=is_interleaved
            )
        if self.query_scale is not None:
            query = self.query_scale(query, meta.positions)
        attended = backend.attend(kv, self.layer, query, meta, spec, self.sinks)  # [T, H, D]
        return kv, self.out(backend, attended.view(num_tokens, query_size))

    def _rotated_and_normalized(
        self,
        backend: Backend,
        query: torch.Tensor,
        key: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query [T, H, D] and key [T, H_kv, D], then normalize each head."""
        assert self.rope is not None and self.query_norm is not None and self.key_norm is not None
        query, key = backend.rope(
            query, key, meta.positions, ropes[self.rope], is_interleaved=self.is_interleaved
        )
        return self.query_norm(backend, query), self.key_norm(backend, key)

    def _normalized(
        self, backend: Backend, x: torch.Tensor, norm: HeadNorm | None, num_heads: int
    ) -> torch.Tensor:
        """Reshape x [T, H D] to [T, H, D], and apply `norm` if there is one."""
        heads = (x.shape[0], num_heads, self.spec.head_size)
        if norm is None:
            return x.view(heads)
        if self.norms_all_heads:
            return norm(backend, x).view(heads)
        return norm(backend, x.view(heads))
