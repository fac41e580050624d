"""compressed-tensors, the format of llm-compressor: w4a16, w8a16, and w8a8 in int8 and FP8.

Only weights are quantized: activations keep the dtype that the device computes in, also for w8a8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.quant.scheme import (
    LayerParts,
    Weight,
    dequantized_by_column,
    grouped,
    scaled_by_blocks,
    setting,
    unpacked,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")


class CompressedTensors:
    """weight_packed int32 [N, K bits / 32], or 8-bit weight [N, K]; weight_scale [N, G].

    weight_zero_point is int8 [N, G], or packed along N; weight_g_idx is as GPTQ's g_idx.
    """

    name = "compressed-tensors"
    separator = "."
    marks = ("weight_scale",)
    parts = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )
    unused = ("input_scale", "input_zero_point", "input_global_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a quantization_config; raise `UnsupportedModel` for sparse and other formats."""
        setting(config, "format", _FORMATS, "pack-quantized")
        setting(config.get("sparsity_config") or {}, "format", ("dense",), "dense")
        self._bits = 4
        for group in (config.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            self._bits = setting(weights, "num_bits", (4, 8), 8)
            setting(weights, "strategy", _STRATEGIES, "tensor")
            setting(weights, "type", ("int", "float"), "int")

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: scale * code, or scale * (code - zero) if it has zero points."""
        scales = parts.get("weight_scale")
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        if parts.has("weight_packed"):
            return self._packed(parts, scales)
        weight = parts.get("weight", None, None)
        if scales.ndim == 1:
            scales = scales[:, None]
        if weight.dtype != torch.int8:
            return scaled_by_blocks(weight, scales)
        rows = scales.expand(len(weight), -1) if len(scales) == 1 else scales
        zeros = None
        if parts.has("weight_zero_point"):
            zeros = parts.get("weight_zero_point").reshape(-1, scales.shape[1]).int() + 128
            zeros = None if bool((zeros == 128).all()) else zeros.expand(len(weight), -1)
        self._check(parts, weight.shape[0], weight.shape[1], rows)
        codes = (weight.short() + 128).to(torch.uint8)
        return grouped(codes, rows, bits=8, zeros=zeros)

    def _packed(self, parts: LayerParts, scales: torch.Tensor) -> Weight:
        num_rows, num_columns = parts.get("weight_shape", 2).tolist()
        words = parts.get("weight_packed", num_rows, None)
        bits = self._bits
        codes = unpacked(words, bits, along_rows=False)
        if codes.shape[1] < num_columns:
            raise parts.error(f"weight_packed has {codes.shape[1]} columns, expected {num_columns}")
        codes = codes[:, :num_columns]
        rows = scales.expand(num_rows, -1) if len(scales) == 1 else scales
        self._check(parts, num_rows, num_columns, rows)
        zeros = None
        if parts.has("weight_zero_point"):
            packed = parts.get("weight_zero_point", None, rows.shape[1])
            zeros = unpacked(packed, bits, along_rows=True)[:num_rows].int()
        if parts.has("weight_g_idx"):
            groups = parts.get("weight_g_idx", num_columns).long()
            if int(groups.min()) < 0 or int(groups.max()) >= rows.shape[1]:
                raise parts.error(f"weight_g_idx has a group outside 0 to {rows.shape[1] - 1}")
            half = torch.full_like(rows, 1 << (bits - 1)) if zeros is None else zeros
            return dequantized_by_column(codes, rows, half, groups)
        return grouped(codes, rows, bits=bits, zeros=zeros)

    @staticmethod
    def _check(parts: LayerParts, num_rows: int, num_columns: int, scales: torch.Tensor) -> None:
        if len(scales) != num_rows or num_columns % scales.shape[1]:
            raise parts.error(
                f"weight_scale has shape {list(scales.shape)}, which does not fit a weight "
                f"[{num_rows}, {num_columns}]"
            )
