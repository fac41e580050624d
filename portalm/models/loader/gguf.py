"""Checkpoints in one GGUF file: our own header reader, tensors dequantised by the gguf package."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import QuantizedWeight
from portalm.config import ModelConfig
from portalm.errors import CheckpointError, ConfigError, UnsupportedModel
from portalm.models.loader.config_json import model_config
from portalm.models.loader.gguf_families import FAMILIES, GGUFFamily
from portalm.models.loader.gguf_file import (
    TYPES,
    Reader,
    TensorInfo,
    map_file,
    read_header,
    read_tensor_infos,
)
from portalm.models.loader.gguf_quantized import GRIDS, as_quantized

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS_AT_A_TIME = 4096
"""Rows that are dequantised at once: several arrays as large as these live meanwhile."""
_ROPE_FACTORS = "rope_freqs.weight"
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
        self._family = self._find_family()
        self._infos = {
            hf_name: info for name, info in infos.items() if (hf_name := self._family.hf_name(name))
        }
        factors = infos.get(_ROPE_FACTORS)
        self.config = self._config(overrides, self._read(factors) if factors else None)

    def _check_extent(self, name: str, info: TensorInfo) -> None:
        if info.kind not in TYPES:
            raise CheckpointError(
                self.path, f"tensor {name!r} is of type {info.kind}, which is not known"
            )
        kind, block_size, block_bytes = TYPES[info.kind]
        if not info.shape or 0 in info.shape or info.shape[-1] % block_size:
            raise CheckpointError(
                self.path,
                f"tensor {name!r} of type {kind} has shape {list(info.shape)}; its rows must "
                f"be a multiple of {block_size} long, and there must be some",
            )
        num_bytes = math.prod(info.shape) // block_size * block_bytes
        if self._start + info.offset + num_bytes > len(self._data):
            raise CheckpointError(
                self.path,
                f"it is truncated: tensor {name!r} ends at byte "
                f"{self._start + info.offset + num_bytes}, the file at {len(self._data)}; "
                f"fetch it again",
            )

    def names(self) -> Sequence[str]:
        """Every tensor there is, by its Hugging Face name."""
        return list(self._infos)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own float dtype, float32 where it was quantised."""
        tensor = self._read(self._info(name))
        if self._family.is_shifted and name.endswith("norm.weight"):
            return tensor.float() - 1.0
        num_heads = self._paired_heads(name)
        return _unpermute(tensor, num_heads) if num_heads else tensor

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """The tensor as it is where it is of a format that `gguf_quantized` knows."""
        info = self._info(name)
        quantized = as_quantized(info.kind, self._blocks(info), info.shape)
        if quantized is None:
            return self.tensor(name)
        num_heads = self._paired_heads(name)
        if num_heads:
            quantized = replace(
                quantized,
                codes=_unpermute(quantized.codes, num_heads),
                scales=_unpermute(quantized.scales, num_heads),
                minimums=None
                if quantized.minimums is None
                else _unpermute(quantized.minimums, num_heads),
            )
        return quantized

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise CheckpointError(self.path, f"no tensor {name!r} among its {len(self._infos)}")
        return info

    def _paired_heads(self, name: str) -> int:
        """Heads whose rotary pairs lie side by side in this tensor; 0: none do."""
        if self._family.is_paired:
            for suffix, num_heads in (
                ("q_proj", self.config.num_heads),
                ("k_proj", self.config.num_kv_heads),
            ):
                if name.endswith((f"{suffix}.weight", f"{suffix}.bias")):
                    return num_heads
        return 0

    def _blocks(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: [rows, bytes a row]."""
        _, block_size, block_bytes = TYPES[info.kind]
        num_bytes = math.prod(info.shape) // block_size * block_bytes
        raw = np.frombuffer(self._data, np.uint8, num_bytes, self._start + info.offset)
        return raw.reshape(-1, info.shape[-1] // block_size * block_bytes)

    def _read(self, info: TensorInfo) -> torch.Tensor:
        kind, raw = TYPES[info.kind][0], self._blocks(info)
        if kind in _PLAIN:
            return torch.from_numpy(raw.copy()).view(_PLAIN[kind]).reshape(info.shape)
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

    def _find_family(self) -> GGUFFamily:
        architecture = str(self.metadata.get("general.architecture", ""))
        if architecture not in FAMILIES:
            raise UnsupportedModel(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        return FAMILIES[architecture]

    def _config(
        self, overrides: Mapping[str, Any], rope_factors: torch.Tensor | None
    ) -> ModelConfig:
        try:
            values = {**self._hf_values(rope_factors), **overrides}
            return model_config(values, {})
        except KeyError as error:
            raise CheckpointError(self.path, f"its metadata has no {error.args[0]!r}") from None
        except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(self.path, f"its metadata makes no model: {error}") from error

    def _hf_values(self, rope_factors: torch.Tensor | None) -> dict[str, Any]:
        """The metadata under config.json's names."""
        metadata, prefix = self.metadata, self.metadata["general.architecture"]
        get: Callable[[str], Any] = lambda key: metadata[f"{prefix}.{key}"]  # noqa: E731
        maybe: Callable[[str], Any] = lambda key: metadata.get(f"{prefix}.{key}")  # noqa: E731
        num_heads = get("attention.head_count")
        embedding = self._infos.get("model.embed_tokens.weight")
        if embedding is None:
            raise KeyError("token_embd.weight")
        rope = _rope_scaling(maybe, rope_factors)
        rotary, head_size = maybe("rope.dimension_count"), maybe("attention.key_length")
        if rotary and rotary != (head_size or get("embedding_length") // num_heads):
            raise UnsupportedModel(
                f"{self.path}: {prefix}.rope.dimension_count is {rotary}, less than a head: "
                f"that is not supported for this architecture"
            )
        return {
            "architectures": [self._family.architecture],
            "vocab_size": embedding.shape[0],
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": maybe("attention.head_count_kv") or num_heads,
            "head_dim": head_size,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_theta": maybe("rope.freq_base"),
            "rope_scaling": rope,
            "tie_word_embeddings": "lm_head.weight" not in self._infos,
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._infos,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._infos,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": [
                metadata[key]
                for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
                if key in metadata
            ],
            "torch_dtype": self._dtype(),
            **self._family.hf_values(metadata),
        }

    def _dtype(self) -> str:
        """What most weights are in; bfloat16 where they are quantised."""
        down = self._infos.get("model.layers.0.mlp.down_proj.weight")
        plain = _PLAIN.get(TYPES[down.kind][0]) if down is not None else None
        return "bfloat16" if plain is None else str(plain).removeprefix("torch.")


def _rope_scaling(
    maybe: Callable[[str], Any], factors: torch.Tensor | None
) -> dict[str, Any] | None:
    if factors is not None:
        return {"rope_type": "factors", "factors": tuple(factors.flatten().tolist())}
    kind = maybe("rope.scaling.type")
    if kind in (None, "none"):
        return None
    scaling = {"rope_type": kind, "factor": maybe("rope.scaling.factor") or 1.0}
    original = maybe("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows in halves again: GGUF has a head's rotary pairs side by side."""
    shape = weight.shape
    head_size = shape[0] // num_heads
    pairs = weight.reshape(num_heads, head_size // 2, 2, *shape[1:])
    return pairs.transpose(1, 2).reshape(shape)
