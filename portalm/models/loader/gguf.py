"""Checkpoints in one GGUF file: our own header reader, tensors dequantised by the gguf package."""

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
from portalm.models.loader.gguf_file import (
    TYPES,
    Reader,
    TensorInfo,
    map_file,
    read_header,
    read_tensor_infos,
)
from portalm.models.loader.gguf_quantized import GRIDS, as_quantized

_ROWS_AT_A_TIME = 4096
"""Rows that are dequantised at once: several arrays as large as these live meanwhile."""
_LATENT, _KEYS, _VALUES = ".kv_b_proj.weight", ".k_b_proj.weight", ".v_b_proj.weight"
"""DeepSeek's, and its parts in newer files."""
_ONE_ROW = "ffn_gate_inp_shexp.weight"
"""A matrix of one row, which conversion makes a vector."""
_VOCABULARY = frozenset(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores"))
"""Metadata that only a tokenizer needs: 100,000s of values."""


class GGUFCheckpoint:
    """One .gguf file; tensors are dequantised when asked for."""

    def __init__(self, path: Path, overrides: Mapping[str, Any]) -> None:
        """Read the header and check that every tensor lies within the file."""
        self.path = path
        self._data: mmap.mmap = map_file(path)
        reader = Reader(path, self._data)
        self.metadata, num_tensors = read_header(reader, skip=_VOCABULARY)
        infos = read_tensor_infos(reader, num_tensors)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise reader.fail(f"general.alignment is {alignment!r}")
        self._start = -(-reader.at // alignment) * alignment
        for name, info in infos.items():
            self._check_extent(name, info)
        self._family = self._find_family(infos)
        self.form = self._family.form
        self._infos = {
            hf_name: part
            for name, info in infos.items()
            for hf_name, part in self._parts(name, info)
        }
        self.config = self._config(infos, overrides)

    def _parts(self, name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
        """What the model calls a tensor of the file, or each expert's part of it."""
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
                f"tensor {name!r} is {list(info.shape)}: the first number is not that of {key}, "
                f"{num_experts}",
            )
        for expert, part in enumerate(info.parts()):
            yield hf_name.format(expert), part

    def _check_extent(self, name: str, info: TensorInfo) -> None:
        if info.kind not in TYPES:
            raise CheckpointError(
                self.path, f"tensor {name!r} is of type {info.kind}, which is not known"
            )
        kind, block_size, _ = TYPES[info.kind]
        if not info.shape or 0 in info.shape or info.shape[-1] % block_size:
            raise CheckpointError(
                self.path,
                f"tensor {name!r} of type {kind} has shape {list(info.shape)}; its rows must "
                f"be a multiple of {block_size} long, and there must be some",
            )
        end = self._start + info.offset + info.num_bytes
        if end > len(self._data):
            raise CheckpointError(
                self.path,
                f"it is truncated: tensor {name!r} ends at byte {end}, the file at "
                f"{len(self._data)}; fetch it again",
            )

    def names(self) -> Sequence[str]:
        """Every tensor there is, by its Hugging Face name."""
        return [name.replace(_KEYS, _LATENT) for name in self._infos if not name.endswith(_VALUES)]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own float dtype, float32 where it was quantised."""
        if name.endswith(_LATENT) and name not in self._infos:
            return self._joined(name)
        tensor = self._read(self._info(name))
        num_heads = self._num_paired_heads(name)
        return tensor if num_heads is None else _unpair(tensor, num_heads)

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """The tensor as it is where it is of a format that `gguf_quantized` knows."""
        if name not in self._infos:
            return self.tensor(name)  # joined of two, or missing
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
            raise CheckpointError(self.path, f"no tensor {name!r} among its {len(self._infos)}")
        return info

    def _joined(self, name: str) -> torch.Tensor:
        """Head by head the rows that make keys, which the file has transposed, then values'."""
        key_name = name.replace(_LATENT, _KEYS)
        keys = self._read(self._info(key_name)).float()  # [H, R, K]
        values = self._read(self._info(name.replace(_LATENT, _VALUES))).float()  # [H, V, R]
        sizes = (keys.shape[:1], keys.shape[1:2], values.shape[:1], values.shape[2:])
        if keys.dim() != 3 or sizes[0] != sizes[2] or sizes[1] != sizes[3]:
            raise CheckpointError(
                self.path,
                f"tensor {key_name!r} is {list(keys.shape)}, which does not go with "
                f"{list(values.shape)} of {_VALUES[1:]}",
            )
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)

    def _num_paired_heads(self, name: str) -> int | None:
        """Number of heads in a tensor whose rows are stored as rotary pairs; None: they are not."""
        layer = name.rpartition(".")[0]
        if not self._family.has_paired_rows or not layer.endswith(("q_proj", "k_proj")):
            return None
        return self.config.num_heads if layer.endswith("q_proj") else self.config.num_kv_heads

    def _blocks(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: [rows, bytes a row]."""
        num_rows = math.prod(info.shape[:-1])
        raw = np.frombuffer(self._data, np.uint8, info.num_bytes, self._start + info.offset)
        return raw.reshape(num_rows, -1)

    def _read(self, info: TensorInfo) -> torch.Tensor:
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
        """Float32 [rows, columns]."""
        # of a grid's points codes are made by dequantising
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
                f"{self.path}: tensors of type {TYPES[kind][0]} cannot be dequantised yet"
            ) from None

    def close(self) -> None:
        """Let go of the file (the mapping goes with the last view of it)."""
        self._infos = {}
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)  # its pages count as ours while they are mapped

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
            raise CheckpointError(self.path, f"its metadata makes no model: {error}") from error


def _unpair(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder each head's rows from adjacent rotary pairs to first halves, then second halves.

    `rows`: [num_heads * head_size, ...].
    """
    shape = rows.shape
    head_size = shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_size // 2, 2, *shape[1:])
    return pairs.transpose(1, 2).reshape(shape)
