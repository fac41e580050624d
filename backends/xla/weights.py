"""Linear weights on the device: as they are, or of few bits, which XLA widens inside a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm.errors import BackendError
from portalm_backends.portable.rounding import round_to
from portalm_backends.xla import layers
from portalm_backends.xla.bridge import Bridge

Array: TypeAlias = Any

FORMATS = frozenset(QUANTIZED_FORMATS)


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [N, K]: scale * code + minimum, by groups of K."""

    codes: torch.Tensor
    """int8, int4 or uint4 [N, K] on the device, zero already taken off."""
    scales: torch.Tensor
    """float32 [N, K / group]"""
    minimums: torch.Tensor | None
    """float32 [N, K / group], where there are any."""


Weight: TypeAlias = "torch.Tensor | FewBits"


def pack(
    bridge: Bridge, weight: torch.Tensor | QuantizedWeight, quantization: str | None
) -> Weight:
    """A weight [N, K] of the host on the device, as `Backend.pack` words it."""
    rows = bridge.divided(weight.shape[0], axis=0)
    if isinstance(weight, torch.Tensor):
        if quantization is None:
            return bridge.tensor(bridge.put(weight, rows))
        try:
            weight = round_to(weight, quantization)
        except ValueError as error:
            raise BackendError("unsupported", f"weights cannot be rounded: {error}") from error
    minimums = weight.minimums
    return FewBits(
        codes=bridge.tensor(jax.device_put(_signed(weight), rows)),
        scales=bridge.tensor(bridge.put(weight.scales, rows)),
        minimums=None if minimums is None else bridge.tensor(bridge.put(minimums, rows)),
    )


def _signed(weight: QuantizedWeight) -> npt.NDArray[Any]:
    """The codes [N, K] less their zero, in as many bits as they have."""
    codes = weight.codes.numpy()
    if weight.minimums is not None:
        return codes.astype(ml_dtypes.uint4) if weight.format.startswith("int4") else codes
    signed = (codes.astype(np.int16) - weight.zero).astype(np.int8)
    return signed.astype(ml_dtypes.int4) if weight.format.startswith("int4") else signed


@jax.jit
def linear(
    x: Array, bias: Array | None, codes: Array, scales: Array, minimums: Array | None
) -> Array:
    """x [T, K] times a weight of few bits [N, K] transposed, plus bias [N]: [T, N]."""
    return layers.linear(x, _widen(codes, scales, minimums, x.dtype), bias)


@jax.jit
def logits(x: Array, codes: Array, scales: Array, minimums: Array | None) -> Array:
    """x [R, C] times a weight of few bits [V, C] transposed, in float32: [R, V]."""
    return layers.logits(x.astype(jnp.float32), _widen(codes, scales, minimums, jnp.float32))


def _widen(codes: Array, scales: Array, minimums: Array | None, dtype: Any) -> Array:
    """[N, K] in `dtype`; part of the product that reads it."""
    rows, columns = codes.shape
    groups = codes.astype(jnp.float32).reshape(rows, scales.shape[1], -1) * scales[:, :, None]
    if minimums is not None:
        groups = groups + minimums[:, :, None]
    return groups.reshape(rows, columns).astype(dtype)
