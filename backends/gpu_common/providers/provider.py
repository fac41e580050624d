"""What a package has to do to compute attention, and which packages are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec, StepMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that a provider is opened for: everything that is the same in all their calls."""

    spec: AttentionSpec
    dtype: torch.dtype
    """Of queries, keys and values."""
    block_size: int
    device: torch.device
    to_device: Callable[[npt.NDArray[np.generic]], torch.Tensor]
    """Copies an array to the device, in order with the steps."""


class AttentionRun(Protocol):
    """A provider, opened for one kind of layer."""

    def attend(self, layer: torch.Tensor, query: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Causal attention of each query token over its request's context.

        Args:
            layer: [NB, H_kv, 2, B, D], one layer of the cache. Slots without a token may be NaN.
            query: [T, H, D]; contiguous except for the first dimension.
            meta: a step without a bucket.

        Returns:
            [T, H, D], in the dtype of `query`, contiguous.
        """
        ...


class AttentionProvider(Protocol):
    """A package that computes attention over a paged cache."""

    package: str
    """Name of the module."""
    archs: frozenset[str]
    """Architectures, by compiler name."""

    def refuses(self, kind: LayerKind) -> str | None:
        """Reason why it cannot compute these layers; None if it can."""
        ...

    def open(self, kind: LayerKind) -> AttentionRun:
        """Import the package and prepare for these layers; may raise whatever the package does."""
        ...


def missing(provider: AttentionProvider, arch: str) -> str | None:
    """Reason why a provider cannot be used here; None if it can. Imports nothing."""
    if arch not in provider.archs:
        return f"{provider.package} does not support {arch}"
    if importlib.util.find_spec(provider.package) is None:
        return f"{provider.package} is not installed"
    return None


def unsupported(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Reason why none of the packages computes these layers; None if they may."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is not a 16-bit float"
    has = {
        "values that are part of their keys": spec.value_size is not None,
        "ALiBi": spec.alibi_slopes is not None,
        "sinks": spec.has_sinks,
    }
    return next((f"layers with {what}" for what, is_used in has.items() if is_used), None)


def planes(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer [NB, H_kv, 2, B, D] as views [NB, H_kv, B, D]."""
    return layer[:, :, 0], layer[:, :, 1]


def summary(providers: Sequence[AttentionProvider], archs: Iterable[str]) -> str:
    """What may compute attention of long prompts on GPUs of these architectures; one line."""
    fitting = [one for one in providers if one.archs & set(archs)]
    found = [one for one in fitting if importlib.util.find_spec(one.package) is not None]
    if found:
        names = " or ".join(f"{one.package} {_version(one.package)}" for one in found)
        return f"{names}, if it passes a check at startup; else PortaLM's own kernels"
    if fitting:
        names = " or ".join(one.package for one in fitting)
        return f"PortaLM's own kernels; {names} would be checked if installed"
    return "PortaLM's own kernels"


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, ())
    return next((importlib.metadata.version(name) for name in names), "(version unknown)")
