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
class MLP:
    """down(activation(up(x)))."""

    up: Linear
    down: Linear
    activation: Activation = "gelu"

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        return self.down(backend, _PLAIN[self.activation](backend, self.up(backend, x)))
