"""MXFP4, the format of GPT-OSS: blocks of 32 4-bit numbers with a power of two as their scale.

Open Compute Project, "Microscaling formats (MX)", 2023. Twice an e2m1 number is an integer between
-12 and 12, so 8-bit codes represent it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.backend import QuantizedWeight
from portalm.quant.recipe import Recipe, excluding
from portalm.quant.scheme import LayerParts, Weight, unpacked_e2m1


class MXFP4:
    """_blocks uint8 [E, N, K / 32, 16], low nibble first; _scales uint8 [E, N, K / 32]."""

    name = "mxfp4"
    separator = "_"
    marks = ("blocks",)
    parts = ("blocks", "scales")
    unused = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the list of modules that are not converted; the format has no variants."""
        self._recipe: Recipe[bool] = Recipe(
            excluded=excluding(config.get("modules_to_not_convert") or ()), default=True
        )

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [E N, K]: the rows of all experts, concatenated."""
        self._recipe.settings(parts)
        blocks = parts.get("blocks", None, None, None, 16, dtypes=(torch.uint8,))
        exponents = parts.get("scales", *blocks.shape[:3], dtypes=(torch.uint8,))
        rows, groups = blocks.shape[0] * blocks.shape[1], blocks.shape[2]
        codes = unpacked_e2m1(blocks).view(rows, groups * 32)
        exponents = exponents.reshape(rows, groups).int()
        scales = torch.ldexp(torch.ones(rows, groups), exponents - 128)
        scales = torch.where(exponents == 255, torch.nan, scales)
        return QuantizedWeight(format="int8", codes=codes, scales=scales, zero=128)
