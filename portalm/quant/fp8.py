"""FP8 weights with one scale per tensor, per row, or per block (as DeepSeek-V3 has, 2024).

Micikevicius et al., "FP8 formats for deep learning", 2022. Only weights are quantized: activations
keep the dtype that the device computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portalm.quant.recipe import Recipe, excluding
from portalm.quant.scheme import FLOATS, FP8_DTYPES, LayerParts, Weight, scaled_by_blocks, setting


class FP8:
    """FP8 weight [N, K]; weight_scale [], [1] or [N, 1], or weight_scale_inv for each block."""

    name = "fp8"
    separator = "."
    marks = ("weight_scale", "weight_scale_inv")
    parts = ("weight_scale", "weight_scale_inv")
    unused = ("input_scale", "input_scale_ub", "activation_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a quantization_config; raise `UnsupportedModel` for other 8-bit formats."""
        setting(config, "fmt", ("e4m3", "e5m2", "float8_e4m3fn"), "e4m3")
        block = config.get("weight_block_size")
        self._block = None if block is None else (int(block[0]), int(block[1]))
        excluded = [
            *(config.get("modules_to_not_convert") or ()),
            *(config.get("ignored_layers") or ()),
        ]
        self._recipe: Recipe[bool] = Recipe(excluded=excluding(excluded), default=True)

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: code * scale (weight_scale_inv is a scale, not an inverse)."""
        self._recipe.settings(parts)
        weight = parts.get("weight", None, None, dtypes=FP8_DTYPES)
        name = "weight_scale" if parts.has("weight_scale") else "weight_scale_inv"
        scales = parts.get(name, dtypes=FLOATS)
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        elif scales.ndim == 1:
            scales = scales[:, None]
        block = self._block if name == "weight_scale_inv" else None
        if block is not None:
            wanted = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)]
            if list(scales.shape) != wanted:
                raise parts.error(f"{name} has shape {list(scales.shape)}, expected {wanted}")
        elif scales.shape not in ((1, 1), (len(weight), 1)):
            raise parts.error(
                f"{name} has shape {list(scales.shape)}, which does not fit a weight "
                f"{list(weight.shape)}"
            )
        return scaled_by_blocks(weight, scales, block)
