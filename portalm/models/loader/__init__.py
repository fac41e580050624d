"""Opens checkpoints of any supported file format as named tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from portalm.config import CHECKPOINT_SCHEMES, EngineConfig
from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import Checkpoint as Checkpoint

if TYPE_CHECKING:
    import torch


def open_checkpoint(
    path: Path, config: EngineConfig, device: torch.device | None = None
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: a folder or a .gguf file, as returned by `resolve_model`.
        config: selects the format, and may override values of config.json.
        device: where random weights are generated, if torch has a generator for it.

    Raises:
        CheckpointError: a file is broken, or its format is not `config.load_format`.
        UnsupportedModel: the checkpoint is valid, but its model is not supported.
    """
    overrides = dict(config.hf_overrides)
    if path.suffix == ".gguf":
        from portalm.models.loader.gguf import GGUFCheckpoint

        if config.load_format not in ("auto", "gguf", "dummy"):
            raise CheckpointError(
                path, f"it is a GGUF file, but load_format is {config.load_format!r}"
            )
        gguf = GGUFCheckpoint(path, overrides)
        return _dummy(path, gguf, config, device) if config.load_format == "dummy" else gguf

    from portalm.models.loader.config_json import read_config

    model_config = read_config(path, overrides)
    if config.load_format == "dummy":
        from portalm.models.loader.dummy import DummyCheckpoint
        from portalm.models.registry import model_class

        shapes = model_class(model_config.architecture)(model_config, model_config.dtype).shapes()
        return DummyCheckpoint(path, model_config, shapes, seed=config.seed, device=device)
    if config.load_format == "gguf":
        raise CheckpointError(
            path, "it is a folder, but load_format is 'gguf': pass the .gguf file"
        )

    from portalm.models.loader.safetensors import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(path, model_config)
    found = model_config.values.get("quantization_config")
    if config.quantization in CHECKPOINT_SCHEMES and not found:
        raise CheckpointError(
            path,
            f"quantization is {config.quantization!r}, but its config.json has no "
            f"quantization_config, and there is no hf_quant_config.json",
        )
    if not found:
        return checkpoint
    from portalm.models.loader.quantized import QuantizedCheckpoint
    from portalm.quant import find_scheme

    scheme = find_scheme(found)
    if config.quantization in CHECKPOINT_SCHEMES and config.quantization != scheme.name:
        raise CheckpointError(
            path, f"its weights are {scheme.name}, but quantization is {config.quantization!r}"
        )
    return QuantizedCheckpoint(checkpoint, scheme)


def _dummy(
    path: Path, real: Checkpoint, config: EngineConfig, device: torch.device | None
) -> Checkpoint:
    from portalm.models.loader.dummy import DummyCheckpoint
    from portalm.models.registry import model_class

    shapes = model_class(real.config.architecture)(real.config, real.config.dtype).shapes()
    real.close()
    return DummyCheckpoint(path, real.config, shapes, seed=config.seed, device=device)
