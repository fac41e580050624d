"""Checkpoints whose weights are quantized in a format of portalm.quant."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from portalm.backend import QuantizedWeight
from portalm.models.loader.checkpoint import Checkpoint
from portalm.quant import Scheme
from portalm.quant.scheme import LayerParts, Weight

logger = logging.getLogger(__name__)


class QuantizedCheckpoint:
    """Combines the parts that `inner` stores for each quantized weight into one tensor."""

    def __init__(self, inner: Checkpoint, scheme: Scheme) -> None:
        """Read parts from `inner`, and close it in `close`."""
        self.path = inner.path
        self.config = inner.config
        self.form = inner.form
        self._inner = inner
        self._scheme = scheme
        self._stored = frozenset(inner.names())
        self._num_dequantized = 0

    def names(self) -> Sequence[str]:
        """Names of all tensors; a quantized weight has one name, its parts have none."""
        between = self._scheme.separator
        parts = (*self._scheme.parts, *self._scheme.unused)
        suffixes = tuple(f"{between}{part}" for part in parts)
        names = [name for name in self._stored if not name.endswith(suffixes)]
        marks = [f"{between}{mark}" for mark in self._scheme.marks]
        layers = {
            name.removesuffix(mark)
            for name in self._stored
            for mark in marks
            if name.endswith(mark)
        }
        return sorted({*names, *(f"{layer}.weight" for layer in layers)})

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor; a quantized one is dequantized to float32."""
        weight = self._read(name)
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def weight(self, name: str) -> Weight:
        """Read a tensor, keeping a quantized matrix quantized if `QuantizedWeight` can hold it."""
        weight = self._read(name)
        if self._layer(name) is not None and not isinstance(weight, QuantizedWeight):
            self._num_dequantized += 1
        return weight

    def unread(self) -> Sequence[str]:
        """Names in the files of all tensors that were not read, and that change a weight."""
        between = self._scheme.separator
        unused = tuple(f"{between}{part}" for part in self._scheme.unused)
        return [name for name in self._inner.unread() if not name.endswith(unused)]

    def _layer(self, name: str) -> str | None:
        """Name of the layer whose quantized weight `name` is; None: `name` is not quantized."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            return None
        between = self._scheme.separator
        is_quantized = any(f"{layer}{between}{mark}" in self._stored for mark in self._scheme.marks)
        return layer if is_quantized else None

    def _read(self, name: str) -> Weight:
        layer = self._layer(name)
        if layer is None:
            return self._inner.tensor(name)
        return self._scheme.read(
            LayerParts(self._inner, self._stored, layer, self._scheme.separator)
        )

    def close(self) -> None:
        """Close the files; log how many weights were dequantized."""
        if self._num_dequantized:
            logger.warning(
                "%d weights of this %s checkpoint are dequantized to the model's dtype: no "
                "quantized format here can hold their exact values",
                self._num_dequantized,
                self._scheme.name,
            )
        self._inner.close()
