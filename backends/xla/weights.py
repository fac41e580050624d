"""Linear weights on the device: floats, or quantized and dequantized inside the product by XLA."""

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
"""Quantized formats that `pack` supports."""


@dataclass(frozen=True, slots=True)
class PackedQuantized:
    """A quantized weight [N, K]: value = scale * code + minimum, per group of columns."""

    codes: torch.Tensor
    """int8, uint8, int4 or uint4 [N, K] on the device; the zero point is already subtracted."""
    scales: torch.Tensor
    """float32 [N, K / group]"""
    minimums: torch.Tensor | None
    """float32 [N, K / group]; None if the format has no minimums."""


Weight: TypeAlias = "torch.Tensor | PackedQuantized"


def pack(
    bridge: Bridge, weight: torch.Tensor | QuantizedWeight, quantization: str | None
) -> Weight:
    """Copy a weight [N, K] to the device, quantizing it if asked to; see `Backend.pack`.

    Raises:
        BackendError: `quantization` is unknown, or the shape has no whole groups.
    """
    rows = bridge.sharded(weight.shape[0], axis=0)
    if isinstance(weight, torch.Tensor):
        if quantization is None:
            return bridge.tensor(bridge.put(weight, rows))
        try:
            weight = round_to(weight, quantization)
        except ValueError as error:
            raise BackendError(
                "unsupported", f"cannot quantize weights to {quantization!r}: {error}"
            ) from error
    minimums = weight.minimums
    return PackedQuantized(
        codes=bridge.tensor(jax.device_put(_signed(weight), rows)),
        scales=bridge.tensor(bridge.put(weight.scales, rows)),
        minimums=None if minimums is None else bridge.tensor(bridge.put(minimums, rows)),
    )


def _signed(weight: QuantizedWeight) -> npt.NDArray[Any]:
    """Codes [N, K] minus their zero point, in the narrowest dtype that holds them."""
    codes = weight.codes.numpy()
    if weight.minimums is not None:
        return codes.astype(ml_dtypes.uint4) if weight.format.startswith("int4") else codes
    signed = (codes.astype(np.int16) - weight.zero).astype(np.int8)
    return signed.astype(ml_dtypes.int4) if weight.format.startswith("int4") else signed


@jax.jit
def linear(
    x: Array, bias: Array | None, codes: Array, scales: Array, minimums: Array | None
) -> Array:
    """Multiply x [T, K] with a quantized weight [N, K] transposed; add bias [N]: [T, N]."""
    return layers.linear(x, _dequantize(codes, scales, minimums, x.dtype), bias)


@jax.jit
def logits(x: Array, codes: Array, scales: Array, minimums: Array | None) -> Array:
    """Multiply x [R, C] with a quantized weight [V, C] transposed, in float32: [R, V]."""
    return layers.logits(x.astype(jnp.float32), _dequantize(codes, scales, minimums, jnp.float32))


def _dequantize(codes: Array, scales: Array, minimums: Array | None, dtype: Any) -> Array:
    """Values [N, K] in `dtype`; XLA fuses this into the product that reads them."""
    rows, columns = codes.shape
    groups = codes.astype(jnp.float32).reshape(rows, scales.shape[1], -1) * scales[:, :, None]
    if minimums is not None:
        groups = groups + minimums[:, :, None]
    return groups.reshape(rows, columns).astype(dtype)
