"""The KV cache: for each layer one array [NB, H_kv, B, 2 P], a value in the lanes behind its key.

P is the head size, padded on a TPU. There an array's last two dimensions lie in tiles of 8 by 128
numbers or more: with the tokens of a block in one and a key with its value in the other, a block of
one head is whole tiles, heads of 64 fill the 128 lanes, and no head is padded beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from portalm.backend import KVSpec
from portalm.errors import BackendError, Unsupported

DTYPES = frozenset({"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})
"""What keys and values may be stored as."""

LANES = 128
"""Numbers side by side in a TPU's vector register."""


def lanes_per_head(head_size: int, *, is_tpu: bool) -> int:
    """P: lanes that a key takes, and its value as many."""
    if not is_tpu:
        return head_size
    half = LANES // 2
    return half if head_size <= half else -(-head_size // LANES) * LANES


def bytes_per_block(spec: KVSpec, *, is_tpu: bool) -> int:
    """Bytes of one block over all layers, padding included."""
    lanes = lanes_per_head(spec.head_size, is_tpu=is_tpu)
    numbers = spec.num_layers * spec.num_kv_heads * spec.block_size * 2 * lanes
    return numbers * int(_dtype(spec).itemsize)


def layer_shape(spec: KVSpec, num_blocks: int, *, is_tpu: bool) -> tuple[int, int, int, int]:
    """[NB, H_kv, B, 2 P]: the array of one layer."""
    lanes = lanes_per_head(spec.head_size, is_tpu=is_tpu)
    return num_blocks, spec.num_kv_heads, spec.block_size, 2 * lanes


def allocate(
    spec: KVSpec,
    num_blocks: int,
    *,
    is_tpu: bool,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, ...]:
    """A cache of `num_blocks` blocks, one array a layer.

    Raises:
        Unsupported: a dtype that is not claimed.
        BackendError: of kind oom, with the size.
    """
    shape, dtype = layer_shape(spec, num_blocks, is_tpu=is_tpu), _dtype(spec)
    try:
        return tuple(jnp.empty(shape, dtype, device=device) for _ in range(spec.num_layers))
    except jax.errors.JaxRuntimeError as error:
        size = num_blocks * bytes_per_block(spec, is_tpu=is_tpu)
        raise BackendError(
            "oom",
            f"no memory for a KV cache of {size / 2**20:.0f} MiB: "
            f"lower --kv-cache-memory-bytes, --max-model-len or --max-num-seqs",
        ) from error


def write(layer: jax.Array, key: jax.Array, value: jax.Array, slots: jax.Array) -> jax.Array:
    """Put keys and values, [T, H_kv, D] each, into their slots, int32 [T], of a layer's array.

    In place where the layer's array is donated.
    """
    block_size = layer.shape[2]
    rows = side_by_side(key, value, layer.shape[3] // 2).astype(layer.dtype)  # [T, H_kv, 2 P]
    at = layer.at[slots // block_size, :, slots % block_size]
    return at.set(rows, mode="promise_in_bounds")


def side_by_side(key: jax.Array, value: jax.Array, lanes: int) -> jax.Array:
    """[..., D] each, padded to `lanes` each: [..., 2 P]."""
    pad = [(0, 0)] * (key.ndim - 1) + [(0, lanes - key.shape[-1])]
    return jnp.concatenate([jnp.pad(key, pad), jnp.pad(value, pad)], axis=-1)


def copy(layers: Sequence[jax.Array], src: jax.Array, dst: jax.Array) -> tuple[jax.Array, ...]:
    """Copy blocks src[i] to dst[i], int32 [N] each, in every layer; in place where donated."""
    return tuple(layer.at[dst].set(layer[src]) for layer in layers)


def export_blocks(layers: Sequence[jax.Array], blocks: jax.Array, head_size: int) -> jax.Array:
    """Blocks int32 [N] in the wire layout, [N, L, 2, B, H_kv, D]."""
    stacked = jnp.stack([layer[blocks] for layer in layers], axis=1)  # [N, L, H_kv, B, 2 P]
    lanes = stacked.shape[-1] // 2
    pairs = stacked.reshape(*stacked.shape[:-1], 2, lanes)[..., :head_size]
    return pairs.transpose(0, 1, 4, 3, 2, 5)


def import_blocks(
    layers: Sequence[jax.Array], blocks: jax.Array, wire: jax.Array
) -> tuple[jax.Array, ...]:
    """The inverse of `export_blocks`, in place where donated; a wire of another dtype is cast."""
    lanes = layers[0].shape[-1] // 2
    wire = wire.astype(layers[0].dtype).transpose(1, 2, 0, 4, 3, 5)  # [L, 2, N, H_kv, B, D]
    return tuple(
        layer.at[blocks].set(side_by_side(key, value, lanes))
        for layer, (key, value) in zip(layers, wire, strict=True)
    )


def _dtype(spec: KVSpec) -> jnp.dtype:
    if spec.dtype not in DTYPES:
        raise Unsupported(
            f"the XLA backend stores keys and values as {', '.join(sorted(DTYPES))}, "
            f"not {spec.dtype}"
        )
    return jnp.dtype(spec.dtype)


# -- as the backend holds it ------------------------------------------------------------------

_COPIES = 32
"""Blocks that are copied at a time: one program, however many there are."""


@dataclass(frozen=True, slots=True)
class XlaKV:
    """A cache of `num_blocks` blocks, the null block included."""

    spec: KVSpec
    num_blocks: int
    layers: tuple[jax.Array, ...]

    def with_layer(self, layer: int, array: jax.Array) -> XlaKV:
        """The same with one layer's array replaced."""
        return replace(self, layers=(*self.layers[:layer], array, *self.layers[layer + 1 :]))


def copy_blocks(
    layers: tuple[jax.Array, ...], src: npt.NDArray[np.int32], dst: npt.NDArray[np.int32]
) -> tuple[jax.Array, ...]:
    """Blocks src[i] copied to dst[i], int32 [N] each, over all layers; what came in is gone."""
    for start in range(0, max(1, len(src)), _COPIES):
        pairs = np.zeros((2, _COPIES), np.int32)  # padding copies the null block to itself
        some = slice(start, start + _COPIES)
        pairs[:, : len(src[some])] = src[some], dst[some]
        layers = copy_in_place(layers, *pairs)
    return layers


write_in_place = functools.partial(jax.jit, donate_argnums=0)(write)
copy_in_place = functools.partial(jax.jit, donate_argnums=0)(copy)
import_in_place = functools.partial(jax.jit, donate_argnums=0)(import_blocks)
export_jitted = functools.partial(jax.jit, static_argnums=2)(export_blocks)
