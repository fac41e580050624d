"""Converts GGUF's quantized tensor types to `QuantizedWeight` without loss.

Layouts are those of ggml-common.h and ggml-quants.c in ggml. Types such as the I-quants store
indices of grid points; the points' coordinates are 8-bit integers, which become the codes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import QuantizedWeight

Bytes = npt.NDArray[np.uint8]
"""uint8 [rows, bytes per row]."""
Floats = npt.NDArray[np.float32]


def as_quantized(kind: int, blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight | None:
    """Convert a matrix to a `QuantizedWeight`; None if its type cannot be converted.

    Args:
        kind: tensor type, a value of gguf.GGMLQuantizationType.
        blocks: the tensor's bytes in the file.
        shape: [N, K] of the matrix; other shapes cannot be converted.
    """
    if len(shape) != 2:
        return None
    if kind in GRIDS:
        return _from_grid(kind, blocks, shape)
    read = _FORMATS.get(kind)
    return None if read is None else read(blocks, shape)


def _float16(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)[..., 0]


def _nibbles(packed: Bytes) -> Bytes:
    """Unpack nibbles, all low ones first: [..., n] -> [..., 2 n]."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _weight(
    format: str,
    shape: tuple[int, ...],
    codes: Bytes,
    scales: Floats,
    *,
    zero: int = 0,
    minimums: Floats | None = None,
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
    """Blocks of 32 in 18 bytes: d, nibbles; w = d * (q - 8)."""
    block = blocks.reshape(shape[0], -1, 18)
    codes = _nibbles(block[..., 2:])
    return _weight("int4", shape, codes, _float16(block[..., :2]), zero=8)


def _q4_1(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 32 in 20 bytes: d, m, nibbles; w = d * q + m."""
    block = blocks.reshape(shape[0], -1, 20)
    codes = _nibbles(block[..., 4:])
    minimums = _float16(block[..., 2:4])
    return _weight("int4_min", shape, codes, _float16(block[..., :2]), minimums=minimums)


def _q5_0(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 32 in 22 bytes: d, fifth bits, nibbles; w = d * (q - 16)."""
    block = blocks.reshape(shape[0], -1, 22)
    fifth = np.unpackbits(np.ascontiguousarray(block[..., 2:6]), axis=-1, bitorder="little")
    codes = _nibbles(block[..., 6:])
    codes |= np.left_shift(fifth, 4, dtype=np.uint8)
    return _weight(
        "int8", shape, np.add(codes, 112, dtype=np.uint8), _float16(block[..., :2]), zero=128
    )


def _q8_0(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 32 in 34 bytes: d, signed bytes; w = d * q."""
    block = blocks.reshape(shape[0], -1, 34)
    return _weight(
        "int8", shape, block[..., 2:] ^ np.uint8(0x80), _float16(block[..., :2]), zero=128
    )


def _q4_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 256 in 144 bytes: d, dmin, 8 scales and 8 minimums of 6 bits, nibbles by 64."""
    block = blocks.reshape(shape[0], -1, 144)
    scales, minimums = _k_scales(block)
    runs = block[..., 16:].reshape(*block.shape[:2], 4, 32)
    return _weight("int4_min", shape, _nibbles(runs), scales, minimums=minimums)


def _k_scales(block: Bytes) -> tuple[Floats, Floats]:
    """Unpack 8 scales and 8 minimums from each block of Q4_K or Q5_K."""
    packed = block[..., 4:16]
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, (third & 0x0F) | (first >> 6) << 4], axis=-1)
    minimums = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=-1)
    return (
        _float16(block[..., 0:2])[..., None] * scales,
        -_float16(block[..., 2:4])[..., None] * minimums,
    )


def _q6_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 256 in 210 bytes: low 4 bits, high 2 bits, 16 scales s, d; w = d s (q - 32)."""
    block = blocks.reshape(shape[0], -1, 210)
    low = block[..., :128].reshape(*block.shape[:2], 2, 64)
    high = block[..., 128:192].reshape(*block.shape[:2], 2, 32)
    codes = _nibbles(low).reshape(*block.shape[:2], 2, 4, 32)
    pairs = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)
    codes |= np.left_shift(pairs, 4, dtype=np.uint8)
    scales = np.ascontiguousarray(block[..., 192:208]).view(np.int8).astype(np.float32)
    scales = scales * _float16(block[..., 208:210])[..., None]
    return _weight("int8_g16", shape, np.add(codes, 96, dtype=np.uint8), scales, zero=128)


def _q5_1(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 32 in 24 bytes: d, m, fifth bits, nibbles; w = d * q + m."""
    block = blocks.reshape(shape[0], -1, 24)
    fifth = np.unpackbits(np.ascontiguousarray(block[..., 4:8]), axis=-1, bitorder="little")
    codes = _nibbles(block[..., 8:])
    codes |= np.left_shift(fifth, 4, dtype=np.uint8)
    minimums = _float16(block[..., 2:4])
    return _weight("int8_min", shape, codes, _float16(block[..., :2]), minimums=minimums)


def _q2_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 256 in 84 bytes: 16 x 4-bit scale and minimum, 2-bit codes by 128, d, dmin."""
    block = blocks.reshape(shape[0], -1, 84)
    steps = block[..., :16]
    runs = block[..., 16:80].reshape(*block.shape[:2], 2, 32)
    codes = np.stack([runs >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)
    return _weight(
        "int8_g16_min",
        shape,
        codes,
        _float16(block[..., 80:82])[..., None] * (steps & 0x0F),
        minimums=-_float16(block[..., 82:84])[..., None] * (steps >> 4),
    )


def _q5_k(blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Blocks of 256 in 176 bytes: as Q4_K, with the fifth bits before the nibbles."""
    block = blocks.reshape(shape[0], -1, 176)
    scales, minimums = _k_scales(block)
    fifth = block[..., 16:48]
    codes = _nibbles(block[..., 48:].reshape(*block.shape[:2], 4, 32))
    codes = codes.reshape(*block.shape[:2], 8, 32)
    codes |= np.stack([(fifth >> run & 1) << 4 for run in range(8)], axis=-2)
    return _weight("int8_min", shape, codes, scales, minimums=minimums)


# -- grid types -------------------------------------------------------------------------------


def _times(d: Floats, steps: npt.NDArray[Any]) -> Floats:
    """Multiply block scales [rows, blocks] by group steps: [rows, blocks, groups]."""
    scales: Floats = (d[..., None] * steps).astype(np.float32)
    return scales


def _alternating_nibbles(packed: Bytes) -> Bytes:
    """Unpack nibbles, low then high for each byte: [..., n] -> [..., 2 n]."""
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _words(raw: Bytes, dtype: type[np.unsignedinteger[Any]]) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(raw).view(dtype).astype(np.int64)


def _iq2_xxs(block: Bytes) -> Floats:
    steps = _words(block[..., 2:66], np.uint32)[..., 1::2] >> 28
    return _times(_float16(block[..., :2]), (0.5 + steps) / 4)


def _iq2_xs(block: Bytes) -> Floats:
    return _times(_float16(block[..., :2]), (0.5 + _alternating_nibbles(block[..., 66:74])) / 4)


def _iq2_s(block: Bytes) -> Floats:
    return _times(_float16(block[..., :2]), (0.5 + _alternating_nibbles(block[..., 74:82])) / 4)


def _iq3_xxs(block: Bytes) -> Floats:
    return _times(
        _float16(block[..., :2]), (0.5 + (_words(block[..., 66:98], np.uint32) >> 28)) / 2
    )


def _iq3_s(block: Bytes) -> Floats:
    return _times(_float16(block[..., :2]), 1.0 + 2.0 * _alternating_nibbles(block[..., 106:110]))


def _iq1_s(block: Bytes) -> Floats:
    """Scales / 8: eight times a point's coordinate is an integer."""
    steps = _words(block[..., 34:50], np.uint16) >> 12 & 7
    return _times(_float16(block[..., :2]), (2 * steps + 1) / 8)


def _iq1_m(block: Bytes) -> Floats:
    """Scales / 8; the bits of d are the highest nibbles of four words of steps."""
    words = _words(block[..., 48:56], np.uint16)
    bits = sum(words[..., i] >> 12 << 4 * i for i in range(4))
    d = np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)
    steps = np.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], axis=-1)
    return _times(d, (2 * steps.reshape(*words.shape[:-1], 16) + 1) / 8)


def _iq4_nl(block: Bytes) -> Floats:
    return _float16(block[..., :2])


def _iq4_xs(block: Bytes) -> Floats:
    high = _words(block[..., 2:4], np.uint16)
    high = np.concatenate([high >> 2 * run & 3 for run in range(8)], axis=-1)
    return _times(
        _float16(block[..., :2]), (_alternating_nibbles(block[..., 4:8]) | high << 4) - 32
    )


def _q3_k(block: Bytes) -> Floats:
    packed = block[..., 96:108].astype(np.int64)
    low = np.concatenate([packed[..., :8] & 0x0F, packed[..., :8] >> 4], axis=-1)
    high = np.concatenate([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return _times(_float16(block[..., 108:110]), (low | high << 4) - 32)


def _tq1_0(block: Bytes) -> Floats:
    return _times(_float16(block[..., 52:54]), np.ones(8))


def _tq2_0(block: Bytes) -> Floats:
    return _times(_float16(block[..., 64:66]), np.ones(8))


def _mxfp4(block: Bytes) -> Floats:
    """Powers of two / 2; codes are twice the e2m1 values (OCP, "Microscaling formats", 2023)."""
    scales: Floats = np.ldexp(np.float32(1), block[..., 0].astype(np.int32) - 128)
    return scales


GRIDS: dict[int, tuple[str, int, Callable[[Bytes], Floats]]] = {
    11: ("int8_g16", 110, _q3_k),
    16: ("int8", 66, _iq2_xxs),
    17: ("int8_g16", 74, _iq2_xs),
    18: ("int8", 98, _iq3_xxs),
    19: ("int8", 50, _iq1_s),
    20: ("int8", 18, _iq4_nl),
    21: ("int8", 110, _iq3_s),
    22: ("int8_g16", 82, _iq2_s),
    23: ("int8", 136, _iq4_xs),
    29: ("int8_g16", 56, _iq1_m),
    34: ("int8", 54, _tq1_0),
    35: ("int8", 66, _tq2_0),
    39: ("int8", 17, _mxfp4),
}
"""Grid types by gguf.GGMLQuantizationType: format, bytes per block, and the function that unpacks
scales [rows, blocks, groups] from blocks [rows, blocks, bytes]."""

_ROWS_AT_A_TIME = 4096
"""Rows dequantized at once, to bound the size of temporary arrays."""


def _from_grid(kind: int, blocks: Bytes, shape: tuple[int, ...]) -> QuantizedWeight:
    """Convert a grid type: dequantize, and divide by the scales to get the codes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    format, block_bytes, scales_of = GRIDS[kind]
    rows, columns = shape
    scales = scales_of(blocks.reshape(rows, -1, block_bytes)).astype(np.float32).reshape(rows, -1)
    codes = np.empty(shape, np.uint8)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        values = dequantize(blocks[part], GGMLQuantizationType(kind))
        divisors = np.where(scales[part] == 0, 1, scales[part])[..., None]
        with np.errstate(invalid="ignore"):  # a NaN scale makes NaN weights
            points = np.nan_to_num(values.reshape(*scales[part].shape, -1) / divisors)
        codes[part] = (np.rint(points) + 128).clip(0, 255).reshape(-1, columns)
    return _weight(format, shape, codes, scales, zero=128)


_FORMATS: dict[int, Callable[[Bytes, tuple[int, ...]], QuantizedWeight]] = {
    2: _q4_0,
    3: _q4_1,
    6: _q5_0,
    7: _q5_1,
    8: _q8_0,
    10: _q2_k,
    12: _q4_k,
    13: _q5_k,
    14: _q6_k,
}
"""Types with a direct conversion, by gguf.GGMLQuantizationType."""
