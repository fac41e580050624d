"""NVIDIA's Model Optimizer: FP8 per tensor, row or block, and NVFP4, mixed by layer or not.

NVIDIA, "Model Optimizer" (unified Hugging Face checkpoints, hf_quant_config.json). Only weights are
quantized: activations keep the dtype that the device computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.errors import UnsupportedModel
from portalm.quant.recipe import Recipe, Rule, by_wildcards
from portalm.quant.scheme import (
    FLOATS,
    FP8_DTYPES,
    LayerParts,
    Weight,
    nvfp4,
    scaled_by_blocks,
    setting,
)

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")
_BLOCK = (128, 128)
"""Rows and columns of a block of FP8_PB_WO."""
_GROUP = 16
"""Columns of a group of NVFP4."""


class ModelOpt:
    """FP8 weight [N, K] and weight_scale; or NVFP4 weight uint8 [N, K / 2] and two scales.

    weight_scale is [], [N] or [N / 128, 1, K / 128, 1] in FP8. In NVFP4 it is FP8 [N, K / 16], and
    weight_scale_2 [] multiplies it.
    """

    name = "modelopt"
    separator = "."
    marks = ("weight_scale",)
    parts = ("weight_scale", "weight_scale_2")
    unused = ("input_scale",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the settings; raise `UnsupportedModel` for other algorithms."""
        excluded: list[Rule[str]] = [
            Rule(str(name), by_wildcards(str(name)), None)
            for name in config.get("exclude_modules") or config.get("ignore") or ()
        ]
        if config.get("quant_algo") == "MIXED_PRECISION":
            layers = dict(config.get("quantized_layers") or {})
            by_name = {name: _algorithm(layer) for name, layer in layers.items()}
            self._recipe = Recipe(excluded=excluded, by_name=by_name)
        else:
            self._recipe = Recipe(excluded=excluded, default=_algorithm(config))

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K], dequantized."""
        algorithm = self._recipe.settings(parts)
        wanted = (torch.uint8,) if algorithm == "NVFP4" else FP8_DTYPES
        weight = parts.get("weight", None, None, dtypes=wanted)
        if algorithm == "NVFP4":
            columns = 2 * weight.shape[1]
            shape = len(weight), columns // _GROUP
            scales = parts.get("weight_scale", *shape, dtypes=FP8_DTYPES)
            if columns % _GROUP:
                raise parts.error(f"{columns} columns cannot be split into groups of {_GROUP}")
            scale = parts.get("weight_scale_2", dtypes=FLOATS)
            if scale.numel() != 1:
                raise parts.error(f"weight_scale_2 has shape {list(scale.shape)}, expected []")
            return nvfp4(weight, scales, float(scale))
        scales = parts.get("weight_scale", dtypes=FLOATS)
        blocks = [-(-n // size) for n, size in zip(weight.shape, _BLOCK, strict=True)]
        by_rows = ([len(weight)], [len(weight), 1])
        if algorithm == "FP8" and scales.numel() == 1:
            return scaled_by_blocks(weight, scales.reshape(1, 1))
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" and list(scales.shape) in by_rows:
            return scaled_by_blocks(weight, scales.reshape(-1, 1))
        if algorithm == "FP8_PB_WO" and list(scales.shape) in (
            blocks,
            [blocks[0], 1, blocks[1], 1],
        ):
            return scaled_by_blocks(weight, scales.reshape(blocks), _BLOCK)
        raise parts.error(
            f"weight_scale has shape {list(scales.shape)}, which does not fit {algorithm} and a "
            f"weight {list(weight.shape)}"
        )


def _algorithm(config: Mapping[str, Any]) -> str:
    """The algorithm of a layer's settings, or of the settings of all layers."""
    name = config.get("quant_algo")
    if name is None:
        raise UnsupportedModel(
            f"the checkpoint's modelopt settings have no quant_algo; supported: "
            f"{', '.join(_ALGORITHMS)}"
        )
    if name == "NVFP4":
        setting(config, "group_size", (_GROUP,), _GROUP)
    return setting(config, "quant_algo", _ALGORITHMS, "FP8")
