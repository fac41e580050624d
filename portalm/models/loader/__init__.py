"""Checkpoints as named tensors, whatever their format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from portalm.config import EngineConfig
from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import Checkpoint as Checkpoint

if TYPE_CHECKING:
    import torch


def open_checkpoint(
    path: Path, config: EngineConfig, device: torch.device | None = None
) -> Checkpoint:
    """The checkpoint at `path`, a folder or a .gguf file, as `resolve_model` gave it.

    Args:
        path: of the checkpoint.
        config: which format, what to override.
        device: where random weights are made, if torch draws random numbers there.

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
        return _dummy(path, gguf, config, device) if config.load_format == "dummy" else gguf

    from portalm.models.loader.config_json import read_config

    model_config = read_config(path, overrides)
    if config.load_format == "dummy":
        from portalm.models.loader.dummy import DummyCheckpoint
        from portalm.models.registry import model_class

        shapes = model_class(model_config.architecture)(model_config, model_config.dtype).shapes()
        return DummyCheckpoint(path, model_config, shapes, seed=config.seed, device=device)
    if config.load_format == "gguf":
        raise CheckpointError(path, "it is a folder, load_format is 'gguf': name the .gguf file")

    from portalm.models.loader.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, model_config)


def _dummy(
    path: Path, real: Checkpoint, config: EngineConfig, device: torch.device | None
) -> Checkpoint:
    from portalm.models.loader.dummy import DummyCheckpoint
    from portalm.models.registry import model_class

    shapes = model_class(real.config.architecture)(real.config, real.config.dtype).shapes()
    real.close()
    return DummyCheckpoint(path, real.config, shapes, seed=config.seed, device=device)
