"""Decoder layers: how attention, feed-forward, norms and the residual go together.

Between layers goes what the last one adds, beside the residual that it is to be added to, so that
adding and norming are one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from portalm.backend import KV, Backend, StepMeta
from portalm.layers.mlp import FeedForward
from portalm.layers.norms import Norm


class SelfAttention(Protocol):
    """Attention over the KV cache."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        x: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """x [T, C], already normed -> (the cache with this step's tokens in it, [T, C])."""
        ...


class Block(Protocol):
    """One decoder layer."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor, torch.Tensor]:
        """One layer over a step.

        Args:
            backend: computes.
            kv: the cache.
            added: [T, C], what the layer before adds to the residual; None in the first layer.
            residual: [T, C]
            ropes: the model's rotations.
            meta: the step.

        Returns:
            The cache, what this layer adds, [T, C], and the residual to add it to, [T, C].
        """
        ...


@dataclass(frozen=True, slots=True)
class SequentialBlock:
    """Attention, then feed-forward, each with a norm before it, behind it, or both."""

    attention: SelfAttention
    mlp: FeedForward
    attention_norm: Norm | None = None
    """Of what goes into attention."""
    mlp_norm: Norm | None = None
    """Of what goes into the feed-forward."""
    attention_out_norm: Norm | None = None
    """Of what comes out of attention, before it is added to the residual."""
    mlp_out_norm: Norm | None = None
    """The same of the feed-forward."""
    multiplier: float = 1.0
    """Of both outputs."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor, torch.Tensor]:
        """See `Block`."""
        x, residual = add_norm(backend, self.attention_norm, added, residual)
        kv, x = self.attention(backend, kv, x, ropes, meta)
        x = self._out(backend, x, self.attention_out_norm)
        x, residual = add_norm(backend, self.mlp_norm, x, residual)
        x = self.mlp(backend, x)
        return kv, self._out(backend, x, self.mlp_out_norm), residual

    def _out(self, backend: Backend, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        x = x if norm is None else norm(backend, x)
        return x if self.multiplier == 1.0 else x * self.multiplier


@dataclass(frozen=True, slots=True)
class ParallelBlock:
    """Attention and feed-forward side by side: Wang and Komatsuzaki, "GPT-J-6B", 2021."""

    attention: SelfAttention
    mlp: FeedForward
    attention_norm: Norm
    mlp_norm: Norm | None = None
    """None: the feed-forward takes what attention takes."""

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor, torch.Tensor]:
        """See `Block`."""
        x, residual = add_norm(backend, self.attention_norm, added, residual)
        kv, attended = self.attention(backend, kv, x, ropes, meta)
        if self.mlp_norm is not None:
            x = self.mlp_norm(backend, residual)
        return kv, self.mlp(backend, x) + attended, residual


def add_norm(
    backend: Backend, norm: Norm | None, added: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of added + residual, added + residual), either of which may not be there."""
    if added is None:
        return residual if norm is None else norm(backend, residual), residual
    if norm is not None:
        return norm.add(backend, added, residual)
    total = added + residual
    return total, total
