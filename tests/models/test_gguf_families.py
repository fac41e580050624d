"""GGUF files of other families than Llama, named and converted as llama.cpp does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from portalm.config import EngineConfig, ModelConfig
from portalm.errors import UnsupportedModel
from portalm.models.loader import open_checkpoint
from portalm.models.loader.gguf import GGUFCheckpoint
from portalm.models.registry import model_class
from tests.models.test_families import CASES

PAIRED = ("smollm3", "granite")
"""Query and key rows are put side by side, pair by pair."""


def paired(weight: np.ndarray, num_heads: int) -> np.ndarray:
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, name: str, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    """Metadata and tensors as the converter of llama.cpp writes them."""
    arch = next(a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("rope_theta") or rope["full_attention"]["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    for hf_name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name.startswith("gemma") and hf_name.endswith("norm.weight"):
            values = values + 1
        if name in PAIRED and hf_name.endswith("q_proj.weight"):
            values = paired(values, config.num_attention_heads)
        if name in PAIRED and hf_name.endswith("k_proj.weight"):
            values = paired(values, config.num_key_value_heads)
        writer.add_tensor(names.get_name(hf_name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shape_of(config: ModelConfig) -> str:
    """All that a model is but its weights; numbers as precise as float32."""
    model = model_class(config.architecture)(config, "float32")
    parts = (
        model.attention_specs(),
        model.ropes(),
        model.shapes(),
        [getattr(model, name) for name in ("embedding_scale", "logit_scale", "logit_cap")],
        (config.norm_eps, config.max_position, config.tie_word_embeddings),
    )
    return re.sub(r"\d+\.\d+(e-\d+)?|\de-\d+", lambda m: f"{float(m.group()):.5g}", str(parts))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2",
                                  "gemma3"])  # fmt: skip
def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    changes = {
        "gemma2": {"query_pre_attn_scalar": 32},  # files do not say it: it is the head size
        "gemma3": {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6},
        "smollm3": {"no_rope_layer_interval": 4},
    }.get(name, {})
    model = replace(case, changes={**case.changes, **changes}).make()
    model.save_pretrained(tmp_path)
    saved = open_checkpoint(tmp_path, EngineConfig(model=str(tmp_path)))
    tensors = {n: saved.tensor(n) for n in saved.names()}

    converted = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", name, model.config, tensors), {})

    assert shape_of(converted.config) == shape_of(saved.config)
    assert set(converted.names()) == set(tensors)
    for hf_name, tensor in tensors.items():
        torch.testing.assert_close(converted.tensor(hf_name), tensor, atol=1e-6, rtol=0)


def test_an_architecture_that_is_not_known_names_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "bloom")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(UnsupportedModel, match="'bloom' is not supported; supported: llama, qwen2"):
        GGUFCheckpoint(tmp_path / "a.gguf", {})
