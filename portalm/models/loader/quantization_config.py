"""Finds how a folder says that its weights are quantized, whatever the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.models.loader.json_file import read_json_object


def quantization_config(folder: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the quantization settings of a checkpoint; None: its weights are not quantized.

    They are in config.json as quantization_config, also under text_config, or as
    compression_config (older compressed-tensors), or in hf_quant_config.json (NVIDIA's Model
    Optimizer).

    Args:
        folder: has config.json.
        values: those of config.json.

    Returns:
        As quantization_config has them, with quant_method.

    Raises:
        CheckpointError: hf_quant_config.json cannot be read.
        UnsupportedModel: there are several, with different values.
    """
    text = values.get("text_config") or {}
    found = [
        config
        for config in (
            values.get("quantization_config"),
            text.get("quantization_config") if isinstance(text, Mapping) else None,
            _compression_config(values.get("compression_config")),
        )
        if config
    ]
    if any(config != found[0] for config in found):
        raise UnsupportedModel(
            "config.json has several quantization settings (quantization_config, "
            "compression_config), with different values: keep one"
        )
    if found:
        if not isinstance(found[0], Mapping):
            raise UnsupportedModel(
                f"config.json: quantization_config must be an object, not {found[0]!r}"
            )
        return dict(found[0])
    file = folder / "hf_quant_config.json"
    return _model_optimizer_config(read_json_object(file)) if file.exists() else None


def _compression_config(found: Any) -> dict[str, Any] | None:
    """Bring the older key of compressed-tensors into the form of the newer one."""
    if not isinstance(found, Mapping):
        return None
    inner = found.get("quantization_config")
    if isinstance(inner, Mapping):
        found = {**inner, "sparsity_config": found.get("sparsity_config")}
    return {**found, "quant_method": "compressed-tensors"}


def _model_optimizer_config(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of hf_quant_config.json; None if only the KV cache is quantized."""
    quantization = values.get("quantization")
    if not isinstance(quantization, Mapping):
        raise UnsupportedModel("hf_quant_config.json has no object 'quantization'")
    if quantization.get("quant_algo") is None and not quantization.get("quantized_layers"):
        return None
    return {**quantization, "quant_method": "modelopt"}
