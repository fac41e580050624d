"""Linear layers: cast, merged and packed at load, applied through the seam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from portalm.backend import Backend, PackedWeight


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed weight and its bias."""

    weight: PackedWeight
    bias: torch.Tensor | None = None
    """[N]"""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        return backend.linear(x, self.weight, self.bias)


def pack_linear(
    backend: Backend,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> Linear:
    """One layer that computes what layers of `weights`, [N_i, K] each, give end to end.

    `biases` is empty or has one [N_i] for each weight.
    """
    merged = torch.cat([w.to(dtype) for w in weights]) if len(weights) > 1 else weights[0].to(dtype)
    bias = torch.cat([b.to(dtype) for b in biases]).to(backend.device()) if biases else None
    return Linear(backend.pack(merged), bias)
