"""A checkpoint whose weights of few bits are written by a scheme of portalm.quant."""

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
    """The checkpoint of plain weights that `inner`'s tensors stand for."""

    def __init__(self, inner: Checkpoint, scheme: Scheme) -> None:
        """Over `inner`, which it closes."""
        self.path = inner.path
        self.config = inner.config
        self.form = inner.form
        self._inner = inner
        self._scheme = scheme
        self._held = frozenset(inner.names())
        self._num_widened = 0

    def names(self) -> Sequence[str]:
        """Every tensor there is, a weight under its own name."""
        between = self._scheme.separator
        suffixes = tuple(f"{between}{part}" for part in self._scheme.parts)
        names = [name for name in self._held if not name.endswith(suffixes)]
        marks = [f"{between}{mark}" for mark in self._scheme.marks]
        layers = {
            name.removesuffix(mark) for name in self._held for mark in marks if name.endswith(mark)
        }
        return sorted({*names, *(f"{layer}.weight" for layer in layers)})

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; float32 where it is of few bits."""
        weight = self._read(name)
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def weight(self, name: str) -> Weight:
        """As `tensor`, but a matrix of few bits as it is, if its format is one of ours."""
        weight = self._read(name)
        if self._layer(name) is not None and not isinstance(weight, QuantizedWeight):
            self._num_widened += 1
        return weight

    def _layer(self, name: str) -> str | None:
        """The layer whose weight `name` is, if it is written by the scheme."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            return None
        between = self._scheme.separator
        is_ours = any(f"{layer}{between}{mark}" in self._held for mark in self._scheme.marks)
        return layer if is_ours else None

    def _read(self, name: str) -> Weight:
        layer = self._layer(name)
        if layer is None:
            return self._inner.tensor(name)
        return self._scheme.read(LayerParts(self._inner, self._held, layer, self._scheme.separator))

    def close(self) -> None:
        """Let go of the files."""
        if self._num_widened:
            logger.warning(
                "%d weights of this %s checkpoint are kept in the model's dtype: no format of few "
                "bits has exactly their values",
                self._num_widened,
                self._scheme.name,
            )
        self._inner.close()
