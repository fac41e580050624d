"""The feed-forward part of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from portalm.backend import Backend
from portalm.layers.linear import Linear

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
"""gelu: the exact form; gelu_tanh: its tanh approximation; relu2: relu(x) squared."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Activations by their names in config.json."""

_GATED: dict[Activation, Callable[[Backend, torch.Tensor], torch.Tensor]] = {
    "silu": lambda backend, x: backend.silu_mul(x),
    "gelu_tanh": lambda backend, x: backend.gelu_tanh_mul(x),
}
_PLAIN: dict[Activation, Callable[[Backend, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda backend, x: backend.gelu(x),
    "gelu_tanh": lambda backend, x: backend.gelu_tanh(x),
    "relu2": lambda backend, x: torch.relu(x).square(),
}
GATED, PLAIN = frozenset(_GATED), frozenset(_PLAIN)
"""Activations that `GatedMLP` and `MLP` support."""


class FeedForward(Protocol):
    """A function of each token on its own: [T, C] -> [T, C]."""

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)): Shazeer, "GLU variants improve transformer", 2020."""

    gate_up: Linear
    """Gate rows, then up rows."""
    down: Linear
    activation: Activation = "silu"

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        return self.down(backend, _GATED[self.activation](backend, self.gate_up(backend, x)))


@dataclass(frozen=True, slots=True)
class XieluMLP:
    """down(xielu(up(x))): Huang and Schlag, "Deriving activation functions", 2024.

    xielu(x) is positive x^2 + beta x for x > 0, else negative (expm1(min(x, eps)) - x) + beta x.
    """

    up: Linear
    down: Linear
    positive: torch.Tensor
    """float32 [1]"""
    negative: torch.Tensor
    """float32 [1]"""
    beta: torch.Tensor
    """float32, a scalar."""
    eps: torch.Tensor
    """float32, a scalar below 0, where expm1 would lose precision."""

    @classmethod
    def of(
        cls,
        up: Linear,
        down: Linear,
        *,
        alpha_p: torch.Tensor,
        alpha_n: torch.Tensor,
        beta: torch.Tensor,
        eps: torch.Tensor,
    ) -> XieluMLP:
        """Make it from the parameters as checkpoints store them, before their softplus."""
        softplus = torch.nn.functional.softplus
        return cls(up, down, softplus(alpha_p), beta + softplus(alpha_n), beta, eps)

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        x = self.up(backend, x)
        wide = x.float()
        below = (torch.expm1(torch.minimum(wide, self.eps)) - wide) * self.negative
        above = self.positive * wide * wide
        return self.down(
            backend, (torch.where(wide > 0, above, below) + self.beta * wide).to(x.dtype)
        )


@dataclass(frozen=True, slots=True)
class MLP:
    """down(activation(up(x)))."""

    up: Linear
    down: Linear
    activation: Activation = "gelu"

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        return self.down(backend, _PLAIN[self.activation](backend, self.up(backend, x)))
