"""AWQ: 4-bit codes with a scale and a zero point per group.

Lin et al., "AWQ", 2023; stored in the layout of AutoAWQ's gemm version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.quant.recipe import Recipe, excluding
from portalm.quant.scheme import (
    FLOATS,
    WORDS,
    LayerParts,
    Weight,
    grouped,
    num_groups,
    setting,
    unpacked,
)

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight columns each of its nibbles holds, lowest nibble first."""


class AWQ:
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]."""

    name = "awq"
    separator = "."
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales")
    unused = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a quantization_config; raise `UnsupportedModel` for other layouts."""
        for name in ("bits", "w_bit"):
            setting(config, name, (4,), 4)
        setting(config, "version", ("gemm", "GEMM"), "gemm")
        size = config.get("group_size") or config.get("q_group_size")
        self._group_size = None if size is None else int(size)
        excluded = config.get("modules_to_not_convert") or ()
        self._recipe: Recipe[bool] = Recipe(excluded=excluding(excluded), default=True)

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: scale * (code - zero)."""
        self._recipe.settings(parts)
        qweight = parts.get("qweight", None, None, dtypes=WORDS)
        scales = parts.get("scales", None, 8 * qweight.shape[1], dtypes=FLOATS)
        qzeros = parts.get("qzeros", len(scales), qweight.shape[1], dtypes=WORDS)
        size, columns = self._group_size, len(qweight)
        if size is not None and len(scales) != num_groups(parts, columns, size):
            raise parts.error(
                f"{columns} columns with {len(scales)} groups, but group_size is {size}"
            )
        if columns % len(scales):
            raise parts.error(f"{columns} columns cannot be split into {len(scales)} groups")
        return grouped(_in_order(qweight).T, scales.T, bits=4, zeros=_in_order(qzeros).T)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Unpack codes in column order: int32 [R, C] -> uint8 [R, 8 C]."""
    codes = unpacked(words, 4, along_rows=False).view(*words.shape, 8)
    ordered = torch.empty_like(codes)
    ordered[..., list(_ORDER)] = codes
    return ordered.view(len(words), -1)
