"""Formats of quantized weights in checkpoints: one file per scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.quant.awq import AWQ
from portalm.quant.bitsandbytes import BitsAndBytes
from portalm.quant.compressed_tensors import CompressedTensors
from portalm.quant.fp8 import FP8
from portalm.quant.gptq import GPTQ
from portalm.quant.modelopt import ModelOpt
from portalm.quant.mxfp4 import MXFP4
from portalm.quant.scheme import Scheme as Scheme

_SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": FP8,
    "fp8": FP8,
    "gptq": GPTQ,
    "modelopt": ModelOpt,
    "modelopt_fp4": ModelOpt,
    "mxfp4": MXFP4,
}
"""Schemes by quant_method of quantization_config in config.json."""


def find_scheme(config: Mapping[str, Any]) -> Scheme:
    """Find the scheme of a `quantization_config`.

    Raises:
        UnsupportedModel: the method, or one of its settings, is not supported.
    """
    method = str(config.get("quant_method", ""))
    if method not in _SCHEMES:
        raise UnsupportedModel(
            f"config.json: quantization_config with quant_method {method!r} is not supported; "
            f"supported: {', '.join(_SCHEMES)}"
        )
    try:
        return _SCHEMES[method](config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"config.json: quantization_config has a value of the wrong type for {method} "
            f"({type(error).__name__}: {error})"
        ) from error
