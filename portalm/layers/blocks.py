"""Decoder layers: how attention, feed-forward, norms and the residual are combined.

A layer returns its output and the residual separately, so that the next layer adds and normalizes
them in one operation.
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
        """Attend: x [T, C], already normalized -> (cache including this step's tokens, [T, C])."""
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
        """Run the layer on one step.

        Args:
            backend: computes.
            kv: KV cache.
            added: [T, C], the previous layer's output, not yet added; None in the first layer.
            residual: [T, C].
            ropes: the model's rotary tables.
            meta: the step.

        Returns:
            The cache, this layer's output [T, C], and the residual [T, C] to add it to.
        """
        ...


@dataclass(frozen=True, slots=True)
class SequentialBlock:
    """Attention, then feed-forward, each with a norm before it, after it, or both."""

    attention: SelfAttention
    mlp: FeedForward
    attention_norm: Norm | None = None
    """Applied to the input of attention."""
    mlp_norm: Norm | None = None
    """Applied to the input of the feed-forward."""
    attention_out_norm: Norm | None = None
    """Applied to the output of attention, before it is added to the residual."""
    mlp_out_norm: Norm | None = None
    """Applied to the output of the feed-forward, before it is added to the residual."""
    multiplier: float = 1.0
    """Scales the outputs of attention and feed-forward."""

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
class PartialBlock:
    """Attention, then feed-forward, of which one or both may be absent."""

    attention: SelfAttention | None
    attention_norm: Norm | None
    mlp: FeedForward | None
    mlp_norm: Norm | None

    def __call__(
        self,
        backend: Backend,
        kv: KV,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        ropes: Sequence[torch.Tensor],
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor, torch.Tensor]:
        """See `Block`; the first layer has a part, so that there is an output."""
        if self.attention is not None:
            x, residual = add_norm(backend, self.attention_norm, added, residual)
            kv, added = self.attention(backend, kv, x, ropes, meta)
        if self.mlp is not None:
            x, residual = add_norm(backend, self.mlp_norm, added, residual)
            added = self.mlp(backend, x)
        assert added is not None
        return kv, added, residual


@dataclass(frozen=True, slots=True)
class ParallelBlock:
    """Attention and feed-forward in parallel: Wang and Komatsuzaki, "GPT-J-6B", 2021."""

    attention: SelfAttention
    mlp: FeedForward
    attention_norm: Norm
    mlp_norm: Norm | None = None
    """None: the feed-forward has the same input as attention."""

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
    """Add and normalize: (norm(added + residual), added + residual), [T, C] each.

    `added` None counts as zero; `norm` None as the identity.
    """
    if added is None:
        return residual if norm is None else norm(backend, residual), residual
    if norm is not None:
        return norm.add(backend, added, residual)
    total = added + residual
    return total, total
