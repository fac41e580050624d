"""Checkpoints in one or more memory-mapped safetensors files."""

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
"""Bytes of tensors returned before a file is mapped again. Pages read from a mapping count as this
process's memory while the mapping exists, so an old mapping would hold the weights a second time.
"""


class SafetensorsCheckpoint:
    """A folder with config.json and *.safetensors."""

    form = HF_FORM

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Open every file; tensors are mapped when they are read."""
        self.path = folder
        self.config = config
        self._files: dict[Path, Any] = {}
        self._num_mapped_bytes = 0
        self._file_of: dict[str, Path] = {}
        self._unread: set[str] = set()
        for path, wanted in _shards(folder).items():
            held = set(self._open(path).keys())
            for name in wanted:
                if name not in held:
                    raise CheckpointError(
                        path, f"it has no tensor {name!r}, which the index lists for it"
                    )
            for name in held:
                if name in self._file_of:
                    raise CheckpointError(
                        path, f"its tensor {name!r} is also in {self._file_of[name].name}"
                    )
                self._file_of[name] = path
        self._unread.update(self._file_of)

    def _open(self, path: Path) -> Any:
        try:
            self._files[path] = safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(
                path, "the index lists this file, but it is missing; download the model again"
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                path, f"it is truncated or not a safetensors file ({error}); download it again"
            ) from error
        return self._files[path]

    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor as a view of the mapped file."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(
                self.path, f"it has no tensor {name!r} in its {len(self._files)} files"
            )
        if self._num_mapped_bytes > _MAX_MAPPED_BYTES:
            self._open(path)  # the old mapping is freed with the last tensor read from it
            self._num_mapped_bytes = 0
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(path, f"cannot read tensor {name!r} ({error})") from error
        self._num_mapped_bytes += tensor.nbytes
        self._unread.discard(name)
        return tensor

    def weight(self, name: str) -> torch.Tensor:
        """Read a tensor; quantized ones are read by `QuantizedCheckpoint`."""
        return self.tensor(name)

    def unread(self) -> Sequence[str]:
        """Names of all tensors that were not read."""
        return sorted(self._unread)

    def close(self) -> None:
        """Close the files."""
        self._files.clear()


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Find the files, and the tensors that the index lists for each.

    Without an index, model.safetensors is the whole checkpoint, or all files together are: some
    folders have the same weights a second time, in consolidated.safetensors.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        whole = folder / "model.safetensors"
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(folder, "this folder has no *.safetensors and no .gguf file")
        return {file: [] for file in files}
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(index, f"it is not a safetensors index ({error!r})") from error
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(str(file)).name != file:
            raise CheckpointError(index, f"it lists a file outside the folder: {file!r}")
        shards.setdefault(folder / file, []).append(str(name))
    return shards
