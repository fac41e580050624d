"""Checkpoints in safetensors files, memory-mapped, in one file or many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from portalm.config import ModelConfig
from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import HF_FORM

INDEX_NAME = "model.safetensors.index.json"

_MAX_MAPPED_BYTES = 64 << 20
"""Of tensors given out, until a file is mapped anew: what was read of a mapping counts as this
process's memory for as long as the mapping lives, and the weights should not be there twice."""


class SafetensorsCheckpoint:
    """A folder with config.json and *.safetensors."""

    form = HF_FORM

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Open every file; tensors are mapped when asked for."""
        self.path = folder
        self.config = config
        self._files: dict[Path, Any] = {}
        self._num_mapped_bytes = 0
        self._file_of: dict[str, Path] = {}
        for path, wanted in _shards(folder).items():
            opened = self._open(path)
            held = set(opened.keys())
            for name in held if wanted is None else wanted:
                if name not in held:
                    raise CheckpointError(path, f"the index says it holds tensor {name!r}")
                self._file_of[name] = path

    def _open(self, path: Path) -> Any:
        try:
            self._files[path] = safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(
                path, "the index names this file and it is not there; fetch the model again"
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                path, f"it is truncated or not a safetensors file ({error}); fetch it again"
            ) from error
        return self._files[path]

    def names(self) -> Sequence[str]:
        """Every tensor there is."""
        return list(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(self.path, f"no tensor {name!r} in its {len(self._files)} files")
        if self._num_mapped_bytes > _MAX_MAPPED_BYTES:
            self._open(path)  # the old mapping ends with the last tensor that was given out of it
            self._num_mapped_bytes = 0
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(path, f"cannot read tensor {name!r} ({error})") from error
        self._num_mapped_bytes += tensor.nbytes
        return tensor

    def weight(self, name: str) -> torch.Tensor:
        """The tensor: nothing here is of few bits."""
        return self.tensor(name)

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """The files, and the tensors that the index places in each (None: whatever they hold)."""
    index = folder / INDEX_NAME
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                folder, "there is no *.safetensors file in this folder, nor a .gguf"
            )
        return dict.fromkeys(files)
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(index, f"it is not a safetensors index ({error!r})") from error
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if Path(str(file)).name != file:
            raise CheckpointError(index, f"it names a file outside the folder: {file!r}")
        names = shards.setdefault(folder / file, [])
        assert names is not None
        names.append(str(name))
    return shards
