"""Checkpoints in a GGUF file, or in several."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import QuantizedWeight
from portalm.config import ModelConfig
from portalm.errors import CheckpointError, ConfigError, UnsupportedModel
from portalm.models.loader.checkpoint import reorder_rows
from portalm.models.loader.config_json import model_config
from portalm.models.loader.gguf_config import DTYPES, ROPE_FACTORS, hf_values
from portalm.models.loader.gguf_families import FAMILIES, GGUFFamily, find_family
from portalm.models.loader.gguf_file import TYPES, TensorInfo, open_parts
from portalm.models.loader.gguf_quantized import GRIDS, as_quantized

_ROWS_AT_A_TIME = 4096
"""Rows dequantized at once, to bound the size of temporary arrays."""
_LATENT, _KEYS, _VALUES = ".kv_b_proj.weight", ".k_b_proj.weight", ".v_b_proj.weight"
"""DeepSeek's up-projection of the latent vector, and its two parts in newer files."""
_ONE_ROW = "ffn_gate_inp_shexp.weight"
"""A matrix with one row, which GGUF files store as a vector."""
_ROTARY_TABLE = "attn_rot_embd"
"""Part of a name in old files: frequencies that follow from the metadata."""
_SKIPPED = frozenset({"tokenizer.ggml.merges", "tokenizer.ggml.scores"})
"""Metadata that only a tokenizer needs, with hundreds of thousands of values."""


class GGUFCheckpoint:
    """A .gguf file or several; tensors are read, and dequantized if needed, one at a time."""

    def __init__(self, path: Path, overrides: Mapping[str, Any]) -> None:
        """Read the headers, and check that every tensor is within its file."""
        self.path = path
        self._files = open_parts(path, skip=_SKIPPED)
        self.metadata = self._files[0].metadata
        infos = {name: info for file in self._files for name, info in file.infos.items()}
        self._family = self._find_family(infos)
        self.form = self._family.form
        self._were_read: set[str] = set()
        self._infos: dict[str, TensorInfo] = {}
        self._unknown: list[str] = []
        """Names in the file of tensors that the family has no name for."""
        for name, info in infos.items():
            self._add(name, info)
        self.config = self._config(infos, overrides)

    def _add(self, name: str, info: TensorInfo) -> None:
        """Add a tensor under its Hugging Face name."""
        parts = list(self._parts(name, info))
        if not parts and name not in ROPE_FACTORS:
            self._unknown.append(name)
        for hf_name, part in parts:
            if hf_name in self._infos:
                raise CheckpointError(
                    self.path, f"tensor {name!r} and another one are both {hf_name!r}"
                )
            self._infos[hf_name] = part

    def _parts(self, name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
        """Hugging Face name and place of a tensor, or of each expert's part of a stacked one."""
        hf_name = self._family.hf_name(name)
        if hf_name is None:
            return
        if "{}" not in hf_name:
            is_vector = name.endswith(_ONE_ROW) and len(info.shape) == 1
            yield hf_name, replace(info, shape=(1, *info.shape)) if is_vector else info
            return
        key = f"{self.metadata['general.architecture']}.expert_count"
        num_experts = self.metadata.get(key)
        if len(info.shape) < 2 or info.shape[0] != num_experts:
            raise CheckpointError(
                self.path,
                f"tensor {name!r} has shape {list(info.shape)}, but its first dimension must be "
                f"{key}, {num_experts}",
            )
        for expert, part in enumerate(info.parts()):
            yield hf_name.format(expert), part

    def names(self) -> Sequence[str]:
        """Hugging Face names of all tensors."""
        return [name.replace(_KEYS, _LATENT) for name in self._infos if not name.endswith(_VALUES)]

    def unread(self) -> Sequence[str]:
        """Names of all tensors that were not read: Hugging Face's, or the file's if it has none."""
        unread = [name for name in self.names() if name not in self._were_read]
        return unread + [name for name in self._unknown if _ROTARY_TABLE not in name]

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor in the file's float dtype; a quantized one is dequantized to float32."""
        self._were_read.add(name)
        if name.endswith(_LATENT) and name not in self._infos:
            return self._joined(name)
        tensor = self._read(self._info(name))
        num_heads = self._num_paired_heads(name)
        return tensor if num_heads is None else _unpair(tensor, num_heads)

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """Read a tensor, keeping a quantized matrix quantized if `as_quantized` supports it."""
        if name not in self._infos:
            return self.tensor(name)  # stored in two parts, or missing
        self._were_read.add(name)
        info = self._info(name)
        quantized = as_quantized(info.kind, self._blocks(info), info.shape)
        if quantized is None:
            return self.tensor(name)
        num_heads = self._num_paired_heads(name)
        if num_heads is None:
            return quantized
        return reorder_rows(quantized, lambda rows: _unpair(rows, num_heads))

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise CheckpointError(
                self.path, f"it has no tensor {name!r} among its {len(self._infos)} tensors"
            )
        return info

    def _joined(self, name: str) -> torch.Tensor:
        """Join kv_b_proj from its parts: for each head its key rows, then its value rows.

        The file stores the key part transposed. Returns float32 [H * (K + V), R].
        """
        key_name = name.replace(_LATENT, _KEYS)
        keys = self._read(self._info(key_name)).float()  # [H, R, K]
        values = self._read(self._info(name.replace(_LATENT, _VALUES))).float()  # [H, V, R]
        sizes = (keys.shape[:1], keys.shape[1:2], values.shape[:1], values.shape[2:])
        if keys.dim() != 3 or sizes[0] != sizes[2] or sizes[1] != sizes[3]:
            raise CheckpointError(
                self.path,
                f"tensor {key_name!r} has shape {list(keys.shape)}, which does not fit "
                f"{list(values.shape)} of {_VALUES[1:]}",
            )
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)

    def _num_paired_heads(self, name: str) -> int | None:
        """Number of heads of a tensor whose rows are rotary pairs; None: its rows are in order."""
        layer = name.rpartition(".")[0]
        if not self._family.has_paired_rows or not layer.endswith(("q_proj", "k_proj")):
            return None
        return self.config.num_heads if layer.endswith("q_proj") else self.config.num_kv_heads

    def _blocks(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, uint8 [rows, bytes per row]."""
        num_rows = math.prod(info.shape[:-1])
        file = self._files[info.part]
        raw = np.frombuffer(file.data, np.uint8, info.num_bytes, file.start + info.offset)
        return raw.reshape(num_rows, -1)

    def _read(self, info: TensorInfo) -> torch.Tensor:
        """Read a tensor; a quantized one is dequantized to float32."""
        kind, raw = TYPES[info.kind][0], self._blocks(info)
        if kind in DTYPES:
            dtype: torch.dtype = getattr(torch, DTYPES[kind])
            return torch.from_numpy(raw.copy()).view(dtype).reshape(info.shape)
        values = torch.empty((len(raw), info.shape[-1]))
        for row in range(0, len(raw), _ROWS_AT_A_TIME):
            rows = slice(row, row + _ROWS_AT_A_TIME)
            values[rows] = self._dequantized(info.kind, raw[rows], info.shape[-1])
        return values.reshape(info.shape)

    def _dequantized(
        self, kind: int, blocks: npt.NDArray[np.uint8], num_columns: int
    ) -> torch.Tensor:
        """Dequantize blocks to float32 [rows, columns]."""
        # as_quantized dequantizes the types in GRIDS with the gguf package, so use that directly
        shape = (len(blocks), num_columns)
        quantized = None if kind in GRIDS else as_quantized(kind, blocks, shape)
        if quantized is not None:
            return quantized.dequantize()
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return torch.from_numpy(dequantize(blocks, GGMLQuantizationType(kind)))
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.path}: tensors of type {TYPES[kind][0]} are not supported"
            ) from None

    def close(self) -> None:
        """Release the files; a mapping is freed with the last tensor that uses it."""
        self._infos = {}
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in self._files:  # mapped pages count as this process's memory
                file.data.madvise(mmap.MADV_DONTNEED)

    # -- config -------------------------------------------------------------------------------

    def _find_family(self, names: Collection[str]) -> GGUFFamily:
        architecture = str(self.metadata.get("general.architecture", ""))
        family = find_family(
            architecture, lambda key: self.metadata.get(f"{architecture}.{key}"), names
        )
        if family is None:
            raise UnsupportedModel(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        return family

    def _config(self, infos: Mapping[str, TensorInfo], overrides: Mapping[str, Any]) -> ModelConfig:
        factors = {
            name: tuple(self._read(infos[name]).flatten().tolist())
            for name in ROPE_FACTORS
            if name in infos
        }
        try:
            values = hf_values(self.path, self._family, self.metadata, infos, factors)
            return model_config({**values, **overrides}, {})
        except KeyError as error:
            raise CheckpointError(self.path, f"its metadata has no {error.args[0]!r}") from None
        except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(self.path, f"its metadata is invalid: {error}") from error


def _unpair(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder each head's rows from adjacent rotary pairs to first halves, then second halves.

    `rows`: [num_heads * head_size, ...].
    """
    shape = rows.shape
    head_size = shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_size // 2, 2, *shape[1:])
    return pairs.transpose(1, 2).reshape(shape)
