"""Multi-head latent attention: one short vector a token is cached for all heads.

DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1. Keys and values of all heads are linear in one
latent vector c (r numbers), but for a rotated part of the key that all heads share (R numbers).
So a head's score q . W_k c is (W_k^T q) . c, and its result is W_v applied to the weighted sum of
c. The cache holds (c, rotated part), one KV head of r + R numbers whose value is c; keys and values
of heads are never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from portalm.backend import KV, AttentionSpec, Backend, PackedWeight, StepMeta
from portalm.layers.linear import Linear
from portalm.layers.norms import RMSNorm


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's latent attention."""

    layer: int
    spec: AttentionSpec
    """Of one KV head, [r + R], with values of r numbers."""
    rotary_dim: int
    """R"""
    down: Linear
    """[T, C] -> the compressed query, where there is one; the latent vector; the rotated part."""
    query: Linear
    """To each head's part that is not rotated, N numbers, of all heads, then to each head's other
    part: H N + H R."""
    query_norm: RMSNorm | None
    """Of the compressed query; None: `query` takes the layer's input itself."""
    latent_norm: RMSNorm
    key_heads: PackedWeight
    """[H, r, N]: from a head's part of the query to what meets the latent vector."""
    value_heads: PackedWeight
    """[H, V, r]: from the latent vector to a head's value."""
    out: Linear
    """H V -> C"""
    is_interleaved: bool
    """How rotary pairs lie."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """x [T, C], already normed -> (cache with this step's latent vectors, [T, C]).

        `ropes` are the model's tables of cosines and sines, float32 [max_position, rotary_dim].
        """
        spec = self.spec
        num_tokens, heads, rotary = x.shape[0], spec.num_heads, self.rotary_dim
        down = self.down(backend, x)
        compressed, latent, key_turned = torch.split(
            down, [down.shape[1] - spec.head_size, spec.head_size - rotary, rotary], dim=-1
        )
        if self.query_norm is not None:
            x = self.query_norm(backend, compressed)
        query = self.query(backend, x)
        plain, turned = torch.split(
            query, [query.shape[1] - heads * rotary, heads * rotary], dim=-1
        )
        turned, key_turned = backend.rope(
            turned.view(num_tokens, heads, rotary),
            key_turned.view(num_tokens, 1, rotary),
            meta.positions,
            ropes[0],
            is_interleaved=self.is_interleaved,
        )
        latent = self.latent_norm(backend, latent).view(num_tokens, 1, -1)
        key = torch.cat((latent, key_turned), dim=-1)  # [T, 1, r + R]
        kv = backend.kv_write(kv, self.layer, key, key, meta)
        absorbed = backend.linear_heads(plain.view(num_tokens, heads, -1), self.key_heads)
        query = torch.cat((absorbed, turned), dim=-1)  # [T, H, r + R]
        attended = backend.attend(kv, self.layer, query, meta, spec)  # [T, H, r]
        values = backend.linear_heads(attended, self.value_heads)  # [T, H, V]
        return kv, self.out(backend, values.reshape(num_tokens, -1))
