"""bitsandbytes: 8 bits with a scale per row; 4 bits with a scale per block, maybe 8-bit itself.

Dettmers et al., "LLM.int8()", 2022, and "QLoRA", 2023 (nf4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from portalm.quant.recipe import Recipe, excluding
from portalm.quant.scheme import FLOATS, LayerParts, Weight, grouped

_STATES = ("nf4", "fp4")


class BitsAndBytes:
    """weight int8 [N, K] and SCB [N]; or weight uint8 [N K / 2, 1] described by `quant_state`."""

    name = "bitsandbytes"
    separator = "."
    marks = ("SCB", "weight.absmax")
    parts = (
        "SCB",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(f"weight.quant_state.bitsandbytes__{kind}" for kind in _STATES),
    )
    unused = ("weight_format",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the list of modules that are not converted; each weight has its own settings."""
        excluded = config.get("llm_int8_skip_modules") or ()
        self._recipe: Recipe[bool] = Recipe(excluded=excluding(excluded), default=True)

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K], quantized by rows (8 bits) or by blocks (4 bits)."""
        self._recipe.settings(parts)
        if parts.has("weight.absmax"):
            return _four_bits(parts)
        weight = parts.get("weight", None, None, dtypes=(torch.int8,))
        largest = parts.get("SCB", len(weight), dtypes=FLOATS).float()
        codes = (weight.short() + 128).to(torch.uint8)
        return grouped(codes, largest[:, None] / 127, bits=8)


def _four_bits(parts: LayerParts) -> torch.Tensor:
    """Dequantize 4-bit codes to float32 [N, K]: quant_map[code] * absmax of the block."""
    state = _state(parts)
    shape, block = [int(n) for n in state["shape"]], int(state["blocksize"])
    packed = parts.get("weight", dtypes=(torch.uint8,)).flatten()
    if len(shape) != 2 or 2 * len(packed) != shape[0] * shape[1]:
        raise parts.error(
            f"weight has {2 * len(packed)} codes, but its quant_state has shape {shape}"
        )
    num_blocks = -(-2 * len(packed) // block)
    absmax = parts.get("weight.absmax", num_blocks, dtypes=(torch.uint8, *FLOATS))
    if absmax.dtype == torch.uint8:
        outer = int(state["nested_blocksize"])
        values = parts.get("weight.nested_quant_map", 256, dtypes=FLOATS)
        scales = parts.get("weight.nested_absmax", -(-num_blocks // outer), dtypes=FLOATS)
        absmax = values[absmax.long()] * scales.repeat_interleave(outer)[:num_blocks]
        absmax = absmax + float(state["nested_offset"])
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()  # high nibble first
    values = parts.get("weight.quant_map", 16, dtypes=FLOATS).float()[codes.long()]
    return (values * absmax.float().repeat_interleave(block)[: len(values)]).view(shape)


def _state(parts: LayerParts) -> dict[str, Any]:
    for kind in _STATES:
        name = f"weight.quant_state.bitsandbytes__{kind}"
        if parts.has(name):
            try:
                state: dict[str, Any] = json.loads(
                    bytes(parts.get(name, dtypes=(torch.uint8,)).tolist())
                )
                return {key: state[key] for key in ("shape", "blocksize")} | state
            except (ValueError, KeyError, TypeError) as error:
                raise parts.error(f"{name} is not valid ({error!r})") from error
    raise parts.error(f"it has no quant_state for {' or '.join(_STATES)}")
