"""Mixtures of experts: a router gives each token to a few of a layer's feed-forwards.

Shazeer et al., "Outrageously large neural networks", 2017; as Jiang et al., "Mixtral of experts",
2024, have it: no token is dropped, whatever the others chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from portalm.backend import Backend, Experts, PackedWeight
from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward


class Router(Protocol):
    """Which experts a token takes."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (ids int32 [T, k], weights float32 [T, k])."""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """The experts of the highest scores, weighted by a softmax."""

    scores: Linear
    """[T, C] -> [T, E]"""
    top_k: int
    """Experts of a token."""
    is_normalized: bool
    """A token's weights add up to 1; else they are shares of all experts' softmax."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (ids int32 [T, k], weights float32 [T, k])."""
        shares = self.scores(backend, x).float().softmax(dim=-1)  # [T, E]
        weights, ids = shares.topk(self.top_k, dim=-1)  # [T, k]
        if self.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return ids.int(), weights


@dataclass(frozen=True, slots=True)
class GroupRouter:
    """The best experts of a token's best groups: DeepSeek-AI, "DeepSeek-V2" and "-V3", 2024."""

    weight: PackedWeight
    """[E, C], packed for logits: scores are float32's."""
    scoring: Literal["softmax", "sigmoid"]
    top_k: int
    """Experts of a token."""
    num_groups: int
    num_chosen_groups: int
    """The others' experts are not looked at."""
    num_best: int
    """A group is worth the sum of so many of its best experts' scores."""
    is_normalized: bool
    """A token's weights are divided by their sum."""
    factor: float
    """Then multiplied by this."""
    bias: torch.Tensor | None = None
    """float32 [E]: added to what experts are chosen by, not to what they are weighted by."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (ids int32 [T, k], weights float32 [T, k])."""
        scores = backend.logits(x, self.weight)  # [T, E]
        shares = scores.softmax(dim=-1) if self.scoring == "softmax" else scores.sigmoid()
        choice = shares if self.bias is None else shares + self.bias
        if self.num_chosen_groups < self.num_groups:
            choice = self._within_best_groups(choice)
        ids = choice.topk(self.top_k, dim=-1).indices  # [T, k]
        weights = shares.gather(1, ids)
        if self.is_normalized:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids.int(), weights * self.factor

    def _within_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """[T, E], -inf where an expert's group is not among its token's best."""
        groups = choice.view(choice.shape[0], self.num_groups, -1)  # [T, G, E / G]
        worth = groups.topk(self.num_best, dim=-1).values.sum(dim=-1)  # [T, G]
        best = worth.topk(self.num_chosen_groups, dim=-1).indices
        is_best = torch.zeros_like(worth).scatter(1, best, 1.0) > 0
        return groups.masked_fill(~is_best[:, :, None], float("-inf")).view(choice.shape)


@dataclass(frozen=True, slots=True)
class MoE:
    """A feed-forward out of experts, and of one that all tokens take."""

    router: Router
    experts: Experts
    shared: FeedForward | None = None
    """What all tokens take besides."""
    shared_gate: Linear | None = None
    """[T, C] -> [T, 1]: its share, through a sigmoid; None: all of it."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        out = backend.moe(x, *self.router(backend, x), self.experts)
        if self.shared is None:
            return out
        shared = self.shared(backend, x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(backend, x)) * shared
        return out + shared
