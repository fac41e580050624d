"""MXFP4, the format of GPT-OSS: blocks of 32 4-bit numbers with a power of two as their scale.

Open Compute Project, "Microscaling formats (MX)", 2023. Twice an e2m1 number is an integer between
-12 and 12, so 8-bit codes represent it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.backend import QuantizedWeight
from portalm.quant.scheme import LayerParts, Weight

_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of each code."""


class MXFP4:
    """_blocks uint8 [E, N, K / 32, 16], low nibble first; _scales uint8 [E, N, K / 32]."""

    name = "mxfp4"
    separator = "_"
    marks = ("blocks",)
    parts = ("blocks", "scales")
    unused = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Accept any quantization_config: the format has no variants."""

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [E N, K]: the rows of all experts, concatenated."""
        blocks = parts.get("blocks", None, None, None, 16)
        exponents = parts.get("scales", *blocks.shape[:3])
        rows, groups = blocks.shape[0] * blocks.shape[1], blocks.shape[2]
        pairs = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).view(rows, groups * 32)
        codes = torch.tensor([128 + half for half in _HALVES], dtype=torch.uint8)[pairs.int()]
        exponents = exponents.reshape(rows, groups).int()
        scales = torch.ldexp(torch.ones(rows, groups), exponents - 128)
        scales = torch.where(exponents == 255, torch.nan, scales)
        return QuantizedWeight(format="int8", codes=codes, scales=scales, zero=128)
