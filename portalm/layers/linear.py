"""Linear layers: cast, merged and packed while loading, computed by the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from portalm.backend import Backend, Capabilities, PackedWeight, QuantizedWeight


class Packer(Protocol):
    """The part of `Backend` that loading weights needs."""

    capabilities: Capabilities

    def device(self) -> torch.device:
        """Device of the packed weights."""
        ...

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """See `Backend.pack`."""
        ...

    def pack_heads(self, weight: torch.Tensor) -> PackedWeight:
        """See `Backend.pack_heads`."""
        ...


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
    backend: Packer,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
    quantization: str | None = None,
) -> Linear:
    """Pack linear layers with the same input into one whose output is theirs concatenated.

    Args:
        backend: packs the weights.
        weights: [N_i, K] of each layer.
        biases: empty, or one [N_i] for each weight.
        dtype: weights that are not quantized are cast to it.
        quantization: format to quantize those weights to; None: keep them in `dtype`.
    """
    bias = torch.cat([b.to(dtype) for b in biases]).to(backend.device()) if biases else None
    return Linear(pack_weight(backend, weights, dtype, quantization), bias)


def pack_weight(
    backend: Packer,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    dtype: torch.dtype,
    quantization: str | None = None,
    *,
    for_logits: bool = False,
) -> PackedWeight:
    """Concatenate weights [N_i, K] by rows and pack them; see `pack_linear`.

    Quantized weights stay quantized if all have one format that the backend supports. Otherwise
    they are dequantized to `dtype`.
    """
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    formats = {w.format for w in quantized}
    is_uniform = len(quantized) == len(weights) and len(formats) == 1
    if is_uniform and formats <= backend.capabilities.quantizations:
        return backend.pack(concatenated(quantized), quantization=quantization)
    plain = [(w.dequantize() if isinstance(w, QuantizedWeight) else w).to(dtype) for w in weights]
    merged = torch.cat(plain) if len(plain) > 1 else plain[0]
    return backend.pack(merged, quantization=quantization, for_logits=for_logits)


def concatenated(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Concatenate weights of one format by rows."""
    if len(weights) == 1:
        return weights[0]
    minimums = [w.minimums for w in weights if w.minimums is not None]
    return replace(
        weights[0],
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        minimums=torch.cat(minimums) if minimums else None,
    )
