"""Mixtures of experts: a router gives each token to a few of a layer's feed-forwards.

Shazeer et al., "Outrageously large neural networks", 2017; as Jiang et al., "Mixtral of experts",
2024, have it: no token is dropped, whatever the others chose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import Backend, Experts
from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward


@dataclass(frozen=True, slots=True)
class MoE:
    """A feed-forward out of experts, and of one that all tokens take."""

    router: Linear
    """[T, C] -> [T, E]"""
    experts: Experts
    top_k: int
    """Experts of a token."""
    is_normalized: bool
    """A token's weights add up to 1; else they are shares of all experts' softmax."""
    shared: FeedForward | None = None
    """What all tokens take besides."""
    shared_gate: Linear | None = None
    """[T, C] -> [T, 1]: its share, through a sigmoid; None: all of it."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        shares = self.router(backend, x).float().softmax(dim=-1)  # [T, E]
        weights, ids = shares.topk(self.top_k, dim=-1)  # [T, k]
        if self.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = backend.moe(x, ids.int(), weights, self.experts)
        if self.shared is None:
            return out
        shared = self.shared(backend, x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(backend, x)) * shared
        return out + shared
