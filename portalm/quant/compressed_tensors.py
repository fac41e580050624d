"""compressed-tensors, the format of llm-compressor: w4a16, w8a16, w8a8 in int8 and FP8, and NVFP4.

Only weights are quantized: activations keep the dtype that the device computes in, also for w8a8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.errors import UnsupportedModel
from portalm.quant.compressed_groups import Group, read_recipe
from portalm.quant.scheme import (
    FLOATS,
    FP8_DTYPES,
    INDEXES,
    WORDS,
    LayerParts,
    Weight,
    dequantized_by_column,
    grouped,
    num_groups,
    nvfp4,
    scaled_by_blocks,
    setting,
    unpacked,
)

_NVFP4_GROUP = 16
"""Columns of a group of NVFP4."""


class CompressedTensors:
    """weight_packed int32 [N, K bits / 32], or 8-bit weight [N, K]; weight_scale [N, G].

    weight_zero_point is int8 [N, G], or packed along N; weight_g_idx is as GPTQ's g_idx. In NVFP4,
    weight_packed is uint8 [N, K / 2], and weight_scale is divided by weight_global_scale.
    """

    name = "compressed-tensors"
    separator = "."
    marks = ("weight_scale", "weight_packed")
    parts = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
    )
    unused = ("input_scale", "input_zero_point", "input_global_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a quantization_config; raise `UnsupportedModel` for sparse and other formats."""
        setting(config.get("sparsity_config") or {}, "format", ("dense",), "dense")
        if (config.get("transform_config") or {}).get("config_groups"):
            raise UnsupportedModel(
                "config.json: quantization_config with transform_config (rotated weights) is not "
                "supported"
            )
        self._recipe = read_recipe(config)

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: scale * code, or scale * (code - zero) if it has zero points."""
        group = self._recipe.settings(parts)
        if group.needs_zeros and not parts.has("weight_zero_point"):
            raise parts.error("it has no weight_zero_point, but its group has symmetric false")
        if group.needs_columns and not parts.has("weight_g_idx"):
            raise parts.error("it has no weight_g_idx, but its group has actorder group")
        if group.bits == 4 and group.kind == "float":
            return _nvfp4(parts)
        scales = parts.get("weight_scale", dtypes=FLOATS)
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        elif scales.ndim == 1:
            scales = scales[:, None]
        if parts.has("weight_packed"):
            return self._packed(parts, group, scales)
        if group.bits != 8:
            raise parts.error(f"weight has 8 bits, but its group has {group.bits}")
        wanted = (torch.int8,) if group.kind == "int" else FP8_DTYPES
        weight = parts.get("weight", None, None, dtypes=wanted)
        if group.block is not None:
            blocks = [-(-n // size) for n, size in zip(weight.shape, group.block, strict=True)]
            if list(scales.shape) != blocks:
                raise parts.error(f"weight_scale has shape {list(scales.shape)}, expected {blocks}")
            return scaled_by_blocks(weight, scales, group.block)
        num_rows, num_columns = weight.shape
        rows = _by_rows(parts, group, scales, num_rows, num_columns)
        if group.kind == "float":
            return scaled_by_blocks(weight, rows)
        zeros = None
        if parts.has("weight_zero_point"):
            stored = parts.get("weight_zero_point", dtypes=(torch.int8,))
            if stored.numel() != scales.numel():
                raise parts.error(
                    f"weight_zero_point has shape {list(stored.shape)}, but weight_scale "
                    f"{list(scales.shape)}"
                )
            zeros = stored.reshape(scales.shape).int() + 128
            zeros = None if bool((zeros == 128).all()) else zeros.expand(num_rows, -1)
        codes = (weight.short() + 128).to(torch.uint8)
        return grouped(codes, rows, bits=8, zeros=zeros)

    def _packed(self, parts: LayerParts, group: Group, scales: torch.Tensor) -> Weight:
        num_rows, num_columns = parts.get("weight_shape", 2, dtypes=INDEXES).tolist()
        words = parts.get("weight_packed", num_rows, None, dtypes=WORDS)
        bits = group.bits
        num_words = -(-num_columns * bits // 32)
        if words.shape[1] != num_words or group.kind != "int":
            raise parts.error(
                f"weight_packed has {words.shape[1]} columns, but {num_columns} {group.kind}s of "
                f"{bits} bits need {num_words}"
            )
        codes = unpacked(words, bits, along_rows=False)[:, :num_columns]
        rows = _by_rows(parts, group, scales, num_rows, num_columns)
        zeros = None
        if parts.has("weight_zero_point"):
            packed = parts.get(
                "weight_zero_point", -(-num_rows * bits // 32), rows.shape[1], dtypes=WORDS
            )
            zeros = unpacked(packed, bits, along_rows=True)[:num_rows].int()
        if parts.has("weight_g_idx"):
            groups = parts.get("weight_g_idx", num_columns, dtypes=INDEXES).long()
            if int(groups.min()) < 0 or int(groups.max()) >= rows.shape[1]:
                raise parts.error(f"weight_g_idx has a group outside 0 to {rows.shape[1] - 1}")
            half = torch.full_like(rows, 1 << (bits - 1)) if zeros is None else zeros
            return dequantized_by_column(codes, rows, half, groups)
        return grouped(codes, rows, bits=bits, zeros=zeros)


def _by_rows(
    parts: LayerParts, group: Group, scales: torch.Tensor, num_rows: int, num_columns: int
) -> torch.Tensor:
    """Check the shape of the scales and repeat a single one: [N, G]."""
    count = 1 if group.size is None else num_groups(parts, num_columns, group.size)
    rows = scales.expand(num_rows, -1) if scales.shape == (1, 1) else scales
    if rows.ndim != 2 or len(rows) != num_rows or rows.shape[1] != count or num_columns % count:
        raise parts.error(
            f"weight_scale has shape {list(scales.shape)}, which does not fit a weight "
            f"[{num_rows}, {num_columns}] with {count} groups in a row"
        )
    return rows


def _nvfp4(parts: LayerParts) -> torch.Tensor:
    """Dequantize NVFP4 to float32 [N, K]."""
    pairs = parts.get("weight_packed", None, None, dtypes=(torch.uint8,))
    columns = 2 * pairs.shape[1]
    if columns % _NVFP4_GROUP:
        raise parts.error(f"{columns} columns cannot be split into groups of {_NVFP4_GROUP}")
    shape = len(pairs), columns // _NVFP4_GROUP
    scales = parts.get("weight_scale", *shape, dtypes=FP8_DTYPES)
    scale = parts.get("weight_global_scale", dtypes=FLOATS)
    if scale.numel() != 1 or float(scale) == 0:
        raise parts.error("weight_global_scale must be one number other than 0")
    return nvfp4(pairs, scales, 1 / float(scale))
