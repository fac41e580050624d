"""The KV cache: one array [NB, H_kv, B, 2 P] per layer, each row a key followed by its value.

P is the head size, padded on a TPU. A TPU stores the last two dimensions in tiles of at least
8 x 128 numbers. With the tokens of a block in one dimension and a key with its value in the other,
a block of one head is whole tiles: heads of size 64 fill the 128 lanes, and the number of heads is
not padded.

A cache of 8-bit codes has two arrays per layer: the codes and their scales. Where values are part
of their keys, a row is the key alone, P lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import export, lax

from portalm.backend import SCALED_KV_DTYPES, KVSpec

DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""Floating-point dtypes that keys and values may be stored in."""

_CODE_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

KV_DTYPES = frozenset({*DTYPES, *_CODE_DTYPES})
"""All supported `KVSpec.dtype`s."""

LANES = 128
"""Lanes of a TPU's vector register, 32 bits each."""


class CodedLayer(NamedTuple):
    """One layer stored as 8-bit codes and scales (`SCALED_KV_DTYPES`)."""

    codes: jax.Array
    """[NB, H_kv, B, 2 P]"""
    scales: jax.Array
    """float32 [NB, H_kv, 2 B]: scales of the keys, then scales of the values."""


Layer: TypeAlias = jax.Array | CodedLayer

export.register_namedtuple_serialization(CodedLayer, serialized_name="portalm CodedLayer")


def block_size_of(layer: Layer) -> int:
    """B, the number of tokens in a block."""
    return int(layer.codes.shape[2] if isinstance(layer, CodedLayer) else layer.shape[2])


def lanes_per_head(head_size: int, *, is_tpu: bool) -> int:
    """P: lanes of a key; its value takes the same number."""
    if not is_tpu:
        return head_size
    half = LANES // 2
    return half if head_size <= half else -(-head_size // LANES) * LANES


def bytes_per_block(spec: KVSpec, *, is_tpu: bool) -> int:
    """Bytes of one block over all layers, padding included."""
    lanes = lanes_per_head(spec.head_size, is_tpu=is_tpu)
    tokens = spec.num_layers * spec.num_kv_heads * spec.block_size
    scales = 2 * 4 if spec.dtype in _CODE_DTYPES else 0
    return tokens * (spec.num_planes * lanes * int(_dtype(spec).itemsize) + scales)


def layer_shape(spec: KVSpec, num_blocks: int, *, is_tpu: bool) -> tuple[int, int, int, int]:
    """Shape of one layer's array: [NB, H_kv, B, 2 P], or [..., P] if values share their keys."""
    lanes = lanes_per_head(spec.head_size, is_tpu=is_tpu)
    return num_blocks, spec.num_kv_heads, spec.block_size, spec.num_planes * lanes


def allocate(
    spec: KVSpec,
    num_blocks: int,
    *,
    is_tpu: bool,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> tuple[Layer, ...]:
    """Allocate an uninitialized cache of `num_blocks` blocks: one array or `CodedLayer` a layer."""
    shape, dtype = layer_shape(spec, num_blocks, is_tpu=is_tpu), _dtype(spec)
    layers = [jnp.empty(shape, dtype, device=device) for _ in range(spec.num_layers)]
    if spec.dtype not in _CODE_DTYPES:
        return tuple(layers)
    scales = (num_blocks, spec.num_kv_heads, 2 * spec.block_size)
    return tuple(
        CodedLayer(codes, jnp.empty(scales, jnp.float32, device=device)) for codes in layers
    )


def write(layer: Layer, key: jax.Array, value: jax.Array | None, slots: jax.Array) -> Layer:
    """Write keys and values, [T, H_kv, D] each, into slots int32 [T] of a layer.

    In place if the layer is donated. With `value` None only keys are stored.
    """
    block_size = block_size_of(layer)
    if isinstance(layer, CodedLayer):
        assert value is not None
        block, offset = slots // block_size, slots % block_size
        scales = layer.scales
        (key, key_scales), (value, value_scales) = (
            encode(x, layer.codes.dtype) for x in (key, value)
        )
        for kept, place in ((key_scales, offset), (value_scales, block_size + offset)):
            scales = scales.at[block, :, place].set(kept, mode="promise_in_bounds")
        return CodedLayer(write(layer.codes, key, value, slots), scales)
    lanes = layer.shape[3] if value is None else layer.shape[3] // 2
    rows = side_by_side(key, value, lanes).astype(layer.dtype)  # [T, H_kv, 2 P]
    at = layer.at[slots // block_size, :, slots % block_size]
    return at.set(rows, mode="promise_in_bounds")


def side_by_side(key: jax.Array, value: jax.Array | None, lanes: int) -> jax.Array:
    """Pad key and value [..., D] to `lanes` and concatenate: [..., 2 P]; a key alone: [..., P]."""
    planes = [key] if value is None else [key, value]
    pad = [(0, 0)] * (key.ndim - 1) + [(0, lanes - key.shape[-1])]
    return jnp.concatenate([jnp.pad(plane, pad) for plane in planes], axis=-1)


def read_keys(layer: Layer, blocks: jax.Array, head_size: int) -> jax.Array:
    """Read keys of blocks int32 [...] from a layer without values: [..., H_kv, B, D]."""
    assert not isinstance(layer, CodedLayer)
    return layer[blocks][..., :head_size]


def read(layer: Layer, blocks: jax.Array, head_size: int) -> tuple[jax.Array, jax.Array]:
    """Read keys and values of blocks int32 [...]: [..., H_kv, B, D] each; codes as float32."""
    rows = layer.codes if isinstance(layer, CodedLayer) else layer

    def half(start: int) -> jax.Array:  # gathered separately: slicing both would add a copy
        lanes = slice(start, start + head_size)
        return rows.at[blocks, :, :, lanes].get(mode="promise_in_bounds")

    key, value = half(0), half(rows.shape[3] // 2)
    if isinstance(layer, CodedLayer):
        key_scales, value_scales = jnp.split(layer.scales[blocks][..., None], 2, axis=-2)
        key = key.astype(jnp.float32) * key_scales
        value = value.astype(jnp.float32) * value_scales
    return key, value


def copy(layers: Sequence[Layer], src: jax.Array, dst: jax.Array) -> tuple[Layer, ...]:
    """Copy blocks src[i] to dst[i], int32 [N] each, in every layer; in place if donated."""
    copied: tuple[Layer, ...] = jax.tree.map(lambda x: x.at[dst].set(x[src]), tuple(layers))
    return copied


def export_blocks(
    layers: Sequence[Layer], blocks: jax.Array, head_size: int, *, shares_values: bool = False
) -> jax.Array:
    """Copy blocks int32 [N] to the wire layout, [N, L, 2, B, H_kv, D].

    With `shares_values` only keys are stored, and the third dimension is 1.
    """
    if shares_values:
        planes = [read_keys(layer, blocks, head_size)[:, None] for layer in layers]
    else:
        planes = [jnp.stack(read(layer, blocks, head_size), axis=1) for layer in layers]
    return jnp.stack(planes, axis=1).swapaxes(3, 4)  # from [N, L, 1 or 2, H_kv, B, D]


def import_blocks(layers: Sequence[Layer], blocks: jax.Array, wire: jax.Array) -> tuple[Layer, ...]:
    """Write blocks in the wire layout into blocks int32 [N], the inverse of `export_blocks`.

    In place if donated; a wire of another dtype is cast.
    """
    wire = wire.transpose(1, 2, 0, 4, 3, 5)  # [L, 1 or 2, N, H_kv, B, D]
    return tuple(
        _put_blocks(layer, blocks, planes[0], planes[1] if len(planes) == 2 else None)
        for layer, planes in zip(layers, wire, strict=True)
    )


def _put_blocks(layer: Layer, blocks: jax.Array, key: jax.Array, value: jax.Array | None) -> Layer:
    if isinstance(layer, CodedLayer):
        assert value is not None
        (key, key_scales), (value, value_scales) = (
            encode(x, layer.codes.dtype) for x in (key, value)
        )
        scales = jnp.concatenate([key_scales, value_scales], axis=-1)
        codes = _put_blocks(layer.codes, blocks, key, value)
        return CodedLayer(codes, layer.scales.at[blocks].set(scales))
    lanes = layer.shape[3] if value is None else layer.shape[3] // 2
    return layer.at[blocks].set(side_by_side(key, value, lanes).astype(layer.dtype))


def encode(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Quantize x [..., D] by the rule of `SCALED_KV_DTYPES`.

    Returns:
        Codes [..., D] in `dtype`, and scales, float32 [...].
    """
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    largest = SCALED_KV_DTYPES["int8" if is_whole else "fp8"]
    x = x.astype(jnp.float32)
    is_finite = jnp.isfinite(x).all(axis=-1)
    scales = jnp.abs(x).max(axis=-1) * np.float32(1 / largest)
    # round to bfloat16; XLA may optimize away a pair of casts
    scales = lax.reduce_precision(scales, exponent_bits=8, mantissa_bits=7)
    is_kept = is_finite & (scales >= 2.0**-100)
    inverse = 1 / jnp.where(is_kept, scales, 1)
    scaled = jnp.where(is_kept[..., None], x * inverse[..., None], 0)
    codes = (jnp.round(scaled) if is_whole else scaled).astype(dtype)
    return codes, jnp.where(is_kept, scales, jnp.where(is_finite, 0, jnp.nan))


def _dtype(spec: KVSpec) -> jnp.dtype:
    dtype: jnp.dtype = jnp.dtype(_CODE_DTYPES.get(spec.dtype, spec.dtype))
    return dtype


# -- the backend's cache object ---------------------------------------------------------------

_COPIES = 32
"""Blocks copied at a time: one program serves any number of blocks."""


@dataclass(frozen=True, slots=True)
class XlaKV:
    """A cache of `num_blocks` blocks, the null block included."""

    spec: KVSpec
    num_blocks: int
    layers: tuple[Layer, ...]

    def with_layer(self, layer: int, array: Layer) -> XlaKV:
        """A copy with one layer replaced."""
        return replace(self, layers=(*self.layers[:layer], array, *self.layers[layer + 1 :]))


def copy_blocks(
    layers: tuple[Layer, ...], src: npt.NDArray[np.int32], dst: npt.NDArray[np.int32]
) -> tuple[Layer, ...]:
    """Copy blocks src[i] to dst[i], int32 [N] each, in all layers; `layers` are donated."""
    for start in range(0, max(1, len(src)), _COPIES):
        pairs = np.zeros((2, _COPIES), np.int32)  # padding copies the null block to itself
        part = slice(start, start + _COPIES)
        pairs[:, : len(src[part])] = src[part], dst[part]
        layers = copy_in_place(layers, *pairs)
    return layers


write_in_place = functools.partial(jax.jit, donate_argnums=0)(write)
copy_in_place = functools.partial(jax.jit, donate_argnums=0)(copy)
import_in_place = functools.partial(jax.jit, donate_argnums=0)(import_blocks)
export_jitted = jax.jit(export_blocks, static_argnums=2, static_argnames="shares_values")
