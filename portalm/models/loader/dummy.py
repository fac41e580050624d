"""Random weights for any config, for benchmarks and tests without a download."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from portalm.config import ModelConfig
from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import HF_FORM


class DummyCheckpoint:
    """Generates tensors when they are read; name and seed determine the values on a device."""

    form = HF_FORM

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        shapes: dict[str, tuple[int, ...]],
        *,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        """Generate tensors of `shapes`, on `device` if torch has a generator for it."""
        self.path = folder
        self.config = config
        self._shapes = shapes
        self._seed = seed
        self._device = torch.device("cpu")
        if device is not None:
            with suppress(RuntimeError):  # torch has no generator for it
                self._device = torch.Generator(device).device

    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor:
        """Generate a tensor: norms near 1, matrices scaled so that activations keep their size."""
        if name not in self._shapes:
            raise CheckpointError(self.path, f"the model has no tensor {name!r}")
        shape = self._shapes[name]
        dtype, device = getattr(torch, self.config.dtype), self._device
        generator = torch.Generator(device).manual_seed(
            self._seed * 1_000_003 + zlib.crc32(name.encode())
        )
        if name.lower().endswith("norm.weight"):
            noise = torch.randn(shape, generator=generator, device=device)
            return (1 + 0.1 * noise).to(dtype)
        scale = 1.0 if len(shape) <= 1 else 1 / math.sqrt(shape[-1])
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0, scale, generator=generator)

    def weight(self, name: str) -> torch.Tensor:
        """Generate a tensor; none are quantized."""
        return self.tensor(name)

    def unread(self) -> Sequence[str]:
        """Nothing: the tensors are those that the model reads."""
        return ()

    def close(self) -> None:
        """Do nothing: no file is open."""
