"""Checkpoints as named tensors, whatever their format."""

from __future__ import annotations

from pathlib import Path

from portalm.config import EngineConfig
from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import Checkpoint as Checkpoint


def open_checkpoint(path: Path, config: EngineConfig) -> Checkpoint:
    """The checkpoint at `path`, a folder or a .gguf file, as `resolve_model` gave it.

    Raises:
        CheckpointError: a file is broken, or not of the format that `config.load_format` asks.
        UnsupportedModel: a well-formed checkpoint of an unknown architecture.
    """
    overrides = dict(config.hf_overrides)
    if path.suffix == ".gguf":
        from portalm.models.loader.gguf import GGUFCheckpoint

        if config.load_format not in ("auto", "gguf", "dummy"):
            raise CheckpointError(path, f"it is a GGUF file, load_format is {config.load_format!r}")
        gguf = GGUFCheckpoint(path, overrides)
        return _dummy(path, gguf, config) if config.load_format == "dummy" else gguf

    from portalm.models.loader.config_json import read_config

    model_config = read_config(path, overrides)
    if config.load_format == "dummy":
        from portalm.models.loader.dummy import DummyCheckpoint
        from portalm.models.registry import model_class

        shapes = model_class(model_config.architecture)(model_config, model_config.dtype).shapes()
        return DummyCheckpoint(path, model_config, shapes, seed=config.seed)
    if config.load_format == "gguf":
        raise CheckpointError(path, "it is a folder, load_format is 'gguf': name the .gguf file")

    from portalm.models.loader.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, model_config)


def _dummy(path: Path, real: Checkpoint, config: EngineConfig) -> Checkpoint:
    from portalm.models.loader.dummy import DummyCheckpoint
    from portalm.models.registry import model_class

    shapes = model_class(real.config.architecture)(real.config, real.config.dtype).shapes()
    real.close()
    return DummyCheckpoint(path, real.config, shapes, seed=config.seed)
