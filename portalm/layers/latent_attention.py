"""Multi-head latent attention: the cache holds one short vector per token for all heads.

DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1. Keys and values of all heads are linear functions of
one latent vector c (r numbers); keys also have a rotary part that all heads share (R numbers).
Therefore a head's score q . W_k c equals (W_k^T q) . c, and its output is W_v times the weighted
sum of c. The cache holds (c, rotary part): one KV head of r + R numbers whose value is c. Keys and
values of single heads are never computed.
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
    """One KV head of size r + R, whose values are its first r numbers."""
    rotary_dim: int
    """R."""
    down: Linear
    """[T, C] -> compressed query (if `query_norm` is set), latent vector [r], rotary part [R]."""
    query: Linear
    """Projects to H N + H R numbers: first the parts of all heads without rotary embedding, N
    each, then all rotary parts."""
    query_norm: RMSNorm | None
    """Applied to the compressed query; None: `query` projects the layer's input."""
    latent_norm: RMSNorm
    key_heads: PackedWeight
    """[H, r, N]: W_k^T of each head, applied to its query without the rotary part."""
    value_heads: PackedWeight
    """[H, V, r]: W_v of each head, from the latent vector to the head's value."""
    out: Linear
    """H V -> C."""
    is_interleaved: bool
    """See `Attention.is_interleaved`."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Write this step's latent vectors to the cache and attend; see `Attention`."""
        spec = self.spec
        num_tokens, heads, rotary = x.shape[0], spec.num_heads, self.rotary_dim
        down = self.down(backend, x)
        compressed, latent, rotary_key = torch.split(
            down, [down.shape[1] - spec.head_size, spec.head_size - rotary, rotary], dim=-1
        )
        if self.query_norm is not None:
            x = self.query_norm(backend, compressed)
        query = self.query(backend, x)
        plain, rotary_query = torch.split(
            query, [query.shape[1] - heads * rotary, heads * rotary], dim=-1
        )
        rotary_query, rotary_key = backend.rope(
            rotary_query.view(num_tokens, heads, rotary),
            rotary_key.view(num_tokens, 1, rotary),
            meta.positions,
            ropes[0],
            is_interleaved=self.is_interleaved,
        )
        latent = self.latent_norm(backend, latent).view(num_tokens, 1, -1)
        key = torch.cat((latent, rotary_key), dim=-1)  # [T, 1, r + R]
        kv = backend.kv_write(kv, self.layer, key, key, meta)
        absorbed = backend.linear_heads(plain.view(num_tokens, heads, -1), self.key_heads)
        query = torch.cat((absorbed, rotary_query), dim=-1)  # [T, H, r + R]
        attended = backend.attend(kv, self.layer, query, meta, spec)  # [T, H, r]
        values = backend.linear_heads(attended, self.value_heads)  # [T, H, V]
        return kv, self.out(backend, values.reshape(num_tokens, -1))
