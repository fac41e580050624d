"""Tables of rotary position embeddings, with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from typing import Any

import torch

from portalm.config import RopeConfig
from portalm.errors import UnsupportedModel


def cos_sin_table(rope: RopeConfig, *, head_size: int, max_position: int) -> torch.Tensor:
    """Cosines and sines of every position: float32 [max_position, rotary_dim], cosines first.

    Su et al., "RoFormer", 2021; scalings as transformers computes them: linear (kaiokendev 2023),
    llama3 (Meta 2024), yarn (Peng et al. 2023), and "factors", one divisor for each frequency.

    Raises:
        UnsupportedModel: a scaling that is not known.
    """
    rotary_dim = rope.rotary_dim or head_size
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequency = 1.0 / (rope.theta**exponent)  # [rotary_dim / 2]
    scaling = dict(rope.scaling)
    kind = scaling.get("rope_type", "default")
    attention_factor = 1.0
    if kind == "linear":
        frequency = frequency / float(scaling["factor"])
    elif kind == "llama3":
        frequency = _llama3(frequency, scaling)
    elif kind == "yarn":
        frequency, attention_factor = _yarn(frequency, scaling, rope, rotary_dim)
    elif kind == "factors":
        frequency = frequency / torch.tensor(scaling["factors"])
    elif kind != "default":
        raise UnsupportedModel(
            f"rope scaling {kind!r} is not supported; supported: linear, llama3, yarn"
        )
    angle = torch.outer(torch.arange(max_position).float(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * attention_factor


def _llama3(frequency: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones stay, those between are blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequency
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / factor + blend * frequency
    stretched = torch.where(wavelength > original / low, frequency / factor, frequency)
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, blended, stretched)


def _yarn(
    frequency: torch.Tensor, scaling: dict[str, Any], rope: RopeConfig, rotary_dim: int
) -> tuple[torch.Tensor, float]:
    """Low dimensions extrapolate, high ones interpolate, with a ramp between."""
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def dimension(num_rotations: float) -> float:
        """The dimension that turns so often over the original length."""
        turns = math.log(original / (num_rotations * 2 * math.pi))
        return rotary_dim * turns / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(float(scaling.get("beta_fast") or 32))), 0)
    high = min(math.ceil(dimension(float(scaling.get("beta_slow") or 1))), rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2).float() - low) / max(high - low, 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    scaled = frequency / factor * (1 - extrapolated) + frequency * extrapolated
    given = scaling.get("attention_factor")
    attention_factor = float(given) if given else 0.1 * math.log(factor) + 1.0
    return scaled, attention_factor
