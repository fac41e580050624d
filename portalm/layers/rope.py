"""Rotary position embedding tables, with the scalings that checkpoints use."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from portalm.config import RopeConfig
from portalm.errors import UnsupportedModel

logger = logging.getLogger(__name__)

_SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"}
    ),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor"}),
    "factors": frozenset({"factors"}),
}  # fmt: skip
"""Scalings with their parameters. "factors", one divisor for each frequency, is how GGUF files
store llama3."""

_EVERYWHERE = frozenset({"rope_type", "original_max_position_embeddings", "finetuned"})


def cos_sin_table(rope: RopeConfig, *, head_size: int, max_position: int) -> torch.Tensor:
    """Compute cosines and sines of every position: float32 [N, rotary_dim], cosines first.

    Su et al., "RoFormer", 2021; scalings as transformers computes them: linear (kaiokendev 2023),
    dynamic (emozilla 2023), llama3 (Meta 2024), yarn (Peng et al. 2023), longrope (Ding et al.
    2024). Dynamic and longrope depend on the length of the text; the table is computed for the
    longest text that can be served, so that a token's rotation does not change as its text grows.

    Args:
        rope: settings of the rotary embedding; N is `rope.max_context`.
        head_size: the rotary dimension if `rope.rotary_dim` is None.
        max_position: length that the model was trained for; N if `rope.max_context` is None.

    Raises:
        UnsupportedModel: the scaling, or one of its parameters, is not supported.
    """
    rotary_dim = rope.rotary_dim or head_size
    max_context = rope.max_context or max_position
    scaling = dict(rope.scaling)
    kind = str(scaling.get("rope_type", "default"))
    _check_known(kind, scaling)
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequency = 1.0 / (rope.theta**exponent)  # [rotary_dim / 2]
    attention_factor = 1.0
    if kind == "linear":
        frequency = frequency / float(scaling["factor"])
    elif kind == "dynamic":
        stretched = _dynamic_theta(rope, scaling, rotary_dim, max_context)
        frequency = 1.0 / (stretched**exponent)
    elif kind == "llama3":
        frequency = _llama3(frequency, scaling)
    elif kind == "yarn":
        frequency, attention_factor = _yarn(frequency, scaling, rope, rotary_dim)
    elif kind == "longrope":
        frequency = frequency / _longrope(scaling, max_context, rotary_dim)
        attention_factor = _longrope_attention_factor(scaling, max_position)
    elif kind == "factors":
        frequency = frequency / torch.tensor(scaling["factors"])
    original = int(scaling.get("original_max_position_embeddings", max_context))
    if kind in ("dynamic", "longrope") and max_context > original:
        logger.warning(
            "rope scaling %s: positions of all texts, short ones too, are scaled for a context of "
            "%d tokens; set --max-model-len %d for the scaling that the model has on short texts",
            kind,
            max_context,
            original,
        )
    angle = torch.outer(torch.arange(max_context).float(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * attention_factor


def _check_known(kind: str, scaling: Mapping[str, Any]) -> None:
    if kind not in _SCALINGS:
        named = ", ".join(sorted(_SCALINGS.keys() - {"default", "factors"}))
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported: {named}")
    for name, value in scaling.items():
        if name not in _SCALINGS[kind] | _EVERYWHERE and value is not None:
            raise UnsupportedModel(
                f"rope scaling {kind}: {name} is {value!r}, which is not supported"
            )


def _dynamic_theta(
    rope: RopeConfig, scaling: Mapping[str, Any], rotary_dim: int, max_context: int
) -> float:
    """The rotary base, increased so that the longest wavelength grows with the context."""
    factor, original = float(scaling["factor"]), int(scaling["original_max_position_embeddings"])
    stretch = factor * max(max_context, original) / original - (factor - 1)
    return float(rope.theta * stretch ** (rotary_dim / (rotary_dim - 2)))


def _longrope(scaling: Mapping[str, Any], max_context: int, rotary_dim: int) -> torch.Tensor:
    """Divisor of each frequency, float32 [rotary_dim / 2]."""
    is_long = max_context > int(scaling["original_max_position_embeddings"])
    factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"]).float()
    if len(factors) != rotary_dim // 2:
        raise UnsupportedModel(
            f"rope scaling longrope has {len(factors)} factors, but the model has "
            f"{rotary_dim // 2} frequencies"
        )
    return factors


def _longrope_attention_factor(scaling: Mapping[str, Any], max_position: int) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    original = int(scaling["original_max_position_embeddings"])
    factor = float(scaling.get("factor") or max_position / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(frequency: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Divide low frequencies by `factor`, keep high ones, interpolate in between."""
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
    frequency: torch.Tensor, scaling: Mapping[str, Any], rope: RopeConfig, rotary_dim: int
) -> tuple[torch.Tensor, float]:
    """Keep the first dimensions, divide the last by `factor`, with a linear ramp in between."""
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def dimension(num_rotations: float) -> float:
        """The dimension that makes `num_rotations` full turns over the original length."""
        turns = math.log(original / (num_rotations * 2 * math.pi))
        return rotary_dim * turns / (2 * math.log(rope.theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2).float() - low) / max(high - low, 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    scaled = frequency / factor * (1 - extrapolated) + frequency * extrapolated
    return scaled, _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if one and all_dims:
        return mscale(float(one)) / mscale(float(all_dims))
    return mscale(1.0)
