"""Weights as a backend receives them and as it keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

PackedWeight: TypeAlias = Any
"""A linear layer's weight in the device's own layout, returned by `Backend.pack`."""

Weights: TypeAlias = dict[str, Any]
"""A model's tensors and packed weights by name."""

QUANTIZED_FORMATS = {
    "int8": 32, "int8_g16": 16, "int8_min": 32, "int8_g16_min": 16, "int4": 32, "int4_min": 32
}  # fmt: skip
"""Quantized formats and their group sizes. The zero code is 128 in int8, 8 in int4 and 0 in formats
with minimums (`_min`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A quantized linear weight [N, K]: scale * (code - zero) + minimum, by groups along K.

    The common form of the simple integer formats that checkpoints use. A backend may compute with
    any layout of its own.
    """

    format: str
    """One of `QUANTIZED_FORMATS`, which gives the group size."""
    codes: torch.Tensor
    """uint8 [N, K]"""
    scales: torch.Tensor
    """float32 [N, K / group]"""
    zero: int = 0
    """The code that represents 0, the same in all groups."""
    minimums: torch.Tensor | None = None
    """float32 [N, K / group] in formats with minimums, where `zero` is 0; else None."""

    @property
    def shape(self) -> torch.Size:
        """Rows and columns, [N, K]."""
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """Return the weight in float32, [N, K]."""
        rows, columns = self.codes.shape
        codes = self.codes.float().view(rows, self.scales.shape[1], -1) - self.zero
        weight = codes * self.scales[:, :, None]
        if self.minimums is not None:
            weight = weight + self.minimums[:, :, None]
        return weight.view(rows, columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class Experts:
    """E gated feed-forward networks of one shape; each token is routed to a few of them.

    Compared by identity, so that a backend may cache what it derives from them.
    """

    gate_up: tuple[PackedWeight, ...]
    """Weight of each expert, [2 I, C], gate rows first, packed by `Backend.pack`."""
    down: tuple[PackedWeight, ...]
    """Weight of each expert, [C, I], packed by `Backend.pack`."""
    gate_up_bias: torch.Tensor | None = None
    """Bias of each expert, [E, 2 I]."""
    down_bias: torch.Tensor | None = None
    """Bias of each expert, [E, C]."""
    swiglu_limit: float | None = None
    """None: an expert computes down(silu(gate) * up). Else gate is clamped to at most this limit,
    up to the limit in both directions, and an expert computes
    down(gate * sigmoid(alpha * gate) * (up + 1)), as gpt-oss does."""
    swiglu_alpha: float = 1.0
    """Alpha in the formula of `swiglu_limit`."""
