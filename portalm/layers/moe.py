"""Mixtures of experts: a router sends each token to a few of a layer's feed-forwards.

Shazeer et al., "Outrageously large neural networks", 2017. As in Jiang et al., "Mixtral of
experts", 2024, experts have no capacity limit, so no token is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from portalm.backend import Backend, Experts, PackedWeight
from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward


class Router(Protocol):
    """Chooses the experts of each token."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (expert ids int32 [T, k], weights float32 [T, k])."""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """Takes the experts with the highest scores, weighted by softmax."""

    scores: Linear
    """[T, C] -> [T, E]"""
    top_k: int
    """Experts per token, k."""
    is_normalized: bool
    """Divide a token's weights by their sum; False: keep the softmax over all experts."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (expert ids int32 [T, k], weights float32 [T, k])."""
        shares = self.scores(backend, x).float().softmax(dim=-1)  # [T, E]
        weights, ids = shares.topk(self.top_k, dim=-1)  # [T, k]
        if self.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return ids.int(), weights


@dataclass(frozen=True, slots=True)
class GroupRouter:
    """Takes the best experts of a token's best groups: DeepSeek-AI, "DeepSeek-V2", "-V3", 2024."""

    weight: PackedWeight
    """[E, C], packed for `Backend.logits`, so that scores are float32."""
    scoring: Literal["softmax", "sigmoid"]
    top_k: int
    """Experts per token, k."""
    is_normalized: bool
    """Divide a token's weights by their sum."""
    num_groups: int = 1
    num_chosen_groups: int = 1
    """Groups whose experts a token may take; the experts of all other groups are excluded."""
    num_best: int = 1
    """A group's score is the sum of this many of its highest expert scores."""
    factor: float = 1.0
    """Multiplies the weights, after normalization."""
    bias: torch.Tensor | None = None
    """float32 [E]: added to the scores that choose experts, not to the weights."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (expert ids int32 [T, k], weights float32 [T, k])."""
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
        """Set scores [T, E] to -inf outside each token's best groups."""
        groups = choice.view(choice.shape[0], self.num_groups, -1)  # [T, G, E / G]
        worth = groups.topk(self.num_best, dim=-1).values.sum(dim=-1)  # [T, G]
        best = worth.topk(self.num_chosen_groups, dim=-1).indices
        is_best = torch.zeros_like(worth).scatter(1, best, 1.0) > 0
        return groups.masked_fill(~is_best[:, :, None], float("-inf")).view(choice.shape)


@dataclass(frozen=True, slots=True)
class SparseMixerRouter:
    """Takes the best expert, then the best other one: Liu et al., "GRIN", 2024, when answering.

    The weight of each is its softmax over the experts whose scores are within a relative margin of
    its own.
    """

    scores: Linear
    """[T, C] -> [T, E]"""
    jitter: float
    """Half the margin."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, C] -> (expert ids int32 [T, 2], weights float32 [T, 2])."""
        scores = self.scores(backend, x).float()  # [T, E]
        left, ids, weights = scores, [], []
        for _ in range(2):
            best, chosen = left.max(dim=-1, keepdim=True)  # [T, 1]
            scale = torch.maximum(scores.abs(), best)
            is_far = (best - scores) / scale > 2 * self.jitter
            shares = left.masked_fill(is_far, float("-inf")).softmax(dim=-1)
            ids.append(chosen)
            weights.append(shares.gather(-1, chosen))
            left = left.scatter(-1, chosen, float("-inf"))
        return torch.cat(ids, dim=-1).int(), torch.cat(weights, dim=-1)


@dataclass(frozen=True, slots=True)
class MoE:
    """A feed-forward of routed experts and an optional shared one."""

    router: Router
    experts: Experts
    shared: FeedForward | None = None
    """Computed for every token and added."""
    shared_gate: Linear | None = None
    """[T, C] -> [T, 1]: its sigmoid scales `shared`; None: no scaling."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        out = backend.moe(x, *self.router(backend, x), self.experts)
        if self.shared is None:
            return out
        shared = self.shared(backend, x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(backend, x)) * shared
        return out + shared
