"""GGUF's integer formats as `QuantizedWeight`s: codes, scales and minimums, nothing lost.

Layouts: ggml-common.h and ggml-quants.c of ggml. Formats that are not integers times a scale by
groups (the I-quants), or have minimums under codes of more than 4 bits, are dequantised instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import QuantizedWeight

Bytes = npt.NDArray[np.uint8]
"""[rows, bytes a row]"""


def as_quantized(kind: int, blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight | None:
    """The matrix of `shape`; None if its format has no such form.

    Args:
        kind: a value of gguf.GGMLQuantizationType.
        blocks: its bytes as they are in the file.
        shape: [N, K]
    """
    read = _FORMATS.get(kind)
    return None if read is None or len(shape) != 2 else read(blocks, shape)


def _float16(raw: Bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)[..., 0]


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2 n]: the low ones, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _weight(
    format: str,
    shape: tuple[int, ...],
    codes: Bytes,
    scales: npt.NDArray[np.float32],
    *,
    zero: int = 0,
    minimums: npt.NDArray[np.float32] | None = None,
) -> QuantizedWeight:
    rows = shape[0]
    return QuantizedWeight(
        format=format,
        codes=torch.from_numpy(np.ascontiguousarray(codes).reshape(shape)),
        scales=torch.from_numpy(np.ascontiguousarray(scales, np.float32).reshape(rows, -1)),
        zero=zero,
        minimums=None
        if minimums is None
        else torch.from_numpy(np.ascontiguousarray(minimums, np.float32).reshape(rows, -1)),
    )


def _q4_0(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """18 bytes for 32: d, nibbles; w = d * (q - 8)."""
    block = blocks.reshape(shape[0], -1, 18)
    codes = _nibbles(block[..., 2:])
    return _weight("int4", shape, codes, _float16(block[..., :2]), zero=8)


def _q4_1(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """20 bytes for 32: d, m, nibbles; w = d * q + m."""
    block = blocks.reshape(shape[0], -1, 20)
    codes = _nibbles(block[..., 4:])
    minimums = _float16(block[..., 2:4])
    return _weight("int4_min", shape, codes, _float16(block[..., :2]), minimums=minimums)


def _q5_0(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """22 bytes for 32: d, the fifth bits, nibbles; w = d * (q - 16)."""
    block = blocks.reshape(shape[0], -1, 22)
    fifth = np.unpackbits(np.ascontiguousarray(block[..., 2:6]), axis=-1, bitorder="little")
    codes = _nibbles(block[..., 6:])
    codes |= np.left_shift(fifth, 4, dtype=np.uint8)
    return _weight(
        "int8", shape, np.add(codes, 112, dtype=np.uint8), _float16(block[..., :2]), zero=128
    )


def _q8_0(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """34 bytes for 32: d, signed bytes; w = d * q."""
    block = blocks.reshape(shape[0], -1, 34)
    return _weight(
        "int8", shape, block[..., 2:] ^ np.uint8(0x80), _float16(block[..., :2]), zero=128
    )


def _q4_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """144 bytes for 256: d, dmin, 8 scales and 8 minimums of 6 bits, nibbles in runs of 64."""
    block = blocks.reshape(shape[0], -1, 144)
    packed = block[..., 4:16]
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, (third & 0x0F) | (first >> 6) << 4], axis=-1)
    minimums = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=-1)
    runs = block[..., 16:].reshape(*block.shape[:2], 4, 32)
    return _weight(
        "int4_min",
        shape,
        _nibbles(runs),
        _float16(block[..., 0:2])[..., None] * scales,
        minimums=-_float16(block[..., 2:4])[..., None] * minimums,
    )


def _q6_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """210 bytes for 256: low nibbles, high pairs of bits, 16 signed scales, d; w = d s (q - 32)."""
    block = blocks.reshape(shape[0], -1, 210)
    low = block[..., :128].reshape(*block.shape[:2], 2, 64)
    high = block[..., 128:192].reshape(*block.shape[:2], 2, 32)
    codes = _nibbles(low).reshape(*block.shape[:2], 2, 4, 32)
    pairs = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)
    codes |= np.left_shift(pairs, 4, dtype=np.uint8)
    scales = np.ascontiguousarray(block[..., 192:208]).view(np.int8).astype(np.float32)
    scales = scales * _float16(block[..., 208:210])[..., None]
    return _weight("int8_g16", shape, np.add(codes, 96, dtype=np.uint8), scales, zero=128)


_FORMATS: dict[int, Callable[[Bytes, tuple[int, ...]], QuantizedWeight]] = {
    2: _q4_0,
    3: _q4_1,
    6: _q5_0,
    8: _q8_0,
    12: _q4_k,
    14: _q6_k,
}
"""By the value of gguf.GGMLQuantizationType."""
