"""The feed-forward part of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import Backend
from portalm.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)): Shazeer, "GLU variants improve transformer", 2020."""

    gate_up: Linear
    """Gate rows, then up rows."""
    down: Linear

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        return self.down(backend, backend.silu_mul(self.gate_up(backend, x)))
