"""Norms: weights that know which operation they belong to."""

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
        """(the norm of x + residual, x + residual), [T, C] each."""
        ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x over its root mean square: Zhang and Sennrich, 2019."""

    weight: torch.Tensor
    """[C]"""
    eps: float

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return backend.rms_norm(x, self.weight, self.eps)

    def add(
        self, backend: Backend, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + residual, x + residual), [T, C] each, as one operation."""
        return backend.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """x less its mean, over its standard deviation: Ba, Kiros and Hinton, 2016."""

    weight: torch.Tensor
    """[C]"""
    bias: torch.Tensor
    """[C]: zeros where the checkpoint has none."""
    eps: float

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return backend.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, backend: Backend, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + residual, x + residual), [T, C] each."""
        total = x + residual
        return self(backend, total), total
