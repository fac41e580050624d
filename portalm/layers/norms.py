"""Norms: weights together with the operation that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from portalm.backend import Backend


class Norm(Protocol):
    """A norm over the last dimension."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        ...

    def add(
        self, backend: Backend, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalize: (norm(x + residual), x + residual), [T, C] each."""
        ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * weight: Zhang and Sennrich, 2019."""

    weight: torch.Tensor
    """[C]"""
    eps: float

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return backend.rms_norm(x, self.weight, self.eps)

    def add(
        self, backend: Backend, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalize in one operation: (norm(x + residual), x + residual), [T, C] each."""
        return backend.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias: Ba, Kiros and Hinton, 2016."""

    weight: torch.Tensor
    """[C]"""
    bias: torch.Tensor
    """[C]; zeros if the checkpoint has none."""
    eps: float

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return backend.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, backend: Backend, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalize: (norm(x + residual), x + residual), [T, C] each."""
        total = x + residual
        return self(backend, total), total


@dataclass(frozen=True, slots=True)
class EachHeadNorm:
    """A layer norm over each head, with its own weights for each head and no bias."""

    plain: LayerNorm
    """A layer norm with weights 1 and bias 0, of size D."""
    weight: torch.Tensor
    """[H, D]."""

    @classmethod
    def of(cls, weight: torch.Tensor, eps: float) -> EachHeadNorm:
        """Make the norm for `weight` [H, D]."""
        ones, zeros = torch.ones_like(weight[0]), torch.zeros_like(weight[0])
        return cls(LayerNorm(ones, zeros, eps), weight)

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [T, H, D]."""
        return self.plain(backend, x) * self.weight
