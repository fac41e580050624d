"""The compared models, written once in Hugging Face's layout and GGUF with the same weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from peers.base import Model
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.models.hub import resolve_model
from portalm.models.loader import open_checkpoint
from portalm.models.loader.gguf_file import read_metadata
from portalm.text.gguf_tokenizer import build_gguf_tokenizer

MODELS = ("smollm2-135m", "llama-1b-shape")

_LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_STD = 0.02
"""Standard deviation of the random weights."""

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that determine the cost of a token."""

    num_weights: int
    """Parameters read per token; a tied embedding counts once."""
    num_head_weights: int
    """Parameters of the head, which only a prompt's last token needs."""
    num_layers: int
    hidden_size: int
    kv_bytes: int
    """Bytes of one token's keys and values in bfloat16."""


def write_model(name: str, cache: Path) -> Model:
    """Return the model `name` in `cache`, writing it first if it is missing."""
    folder = cache / "models" / name
    model = Model(name, folder, folder / f"{name}.bf16.gguf")
    if (folder / "complete").exists():
        return model
    print(f"writing {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = resolve_model(DEFAULT_MODEL)
    metadata = read_metadata(source)
    config, tensors = _default(source) if name == MODELS[0] else _random(_LLAMA_1B)
    vocab = _padded_vocab(metadata, config["vocab_size"])
    _write_tokenizer(folder, source, metadata, vocab)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_gguf(model.gguf, config, tensors, metadata, vocab)
    (folder / "complete").touch()
    return model


def read_shape(model: Model) -> Shape:
    """Compute the model's sizes."""
    config = json.loads((model.folder / "config.json").read_text())
    hidden, ffn, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    head = config["head_dim"]
    num_q, num_kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = 2 * hidden * num_q + 2 * hidden * num_kv + 3 * hidden * ffn
    num_head_weights = config["vocab_size"] * hidden
    return Shape(
        num_weights=layers * layer + num_head_weights,
        num_head_weights=num_head_weights,
        num_layers=layers,
        hidden_size=num_q,
        kv_bytes=2 * 2 * num_kv * layers,
    )


def _config(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **sizes,
    }


def _default(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config and the dequantized weights of the default model."""
    checkpoint = open_checkpoint(source, EngineConfig())
    config = checkpoint.config
    assert config.tie_word_embeddings
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
    }
    tensors = {
        name: checkpoint.tensor(name).to(torch.bfloat16).contiguous()
        for name in checkpoint.names()
        if name != "lm_head.weight"
    }
    return _config(sizes), tensors


def _random(sizes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return random weights, as fast as real ones and small enough not to overflow."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(sizes):
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * _STD).to(torch.bfloat16)
    return _config(sizes), tensors


def _shapes(sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    num_q, num_kv = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (sizes["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for i in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (num_q, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (num_kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (num_kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, num_q)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)


def _padded_vocab(metadata: dict[str, Any], size: int) -> list[str]:
    """Return the tokenizer's tokens, padded with words to `size`: every id has a text."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    return tokens + [f"Ġpad{i}" for i in range(len(tokens), size)]


def _write_tokenizer(
    folder: Path, source: Path, metadata: dict[str, Any], vocab: list[str]
) -> None:
    spec = json.loads(build_gguf_tokenizer(source, metadata).to_str())
    for i in range(len(metadata["tokenizer.ggml.tokens"]), len(vocab)):
        spec["model"]["vocab"][vocab[i]] = i
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocab[1],
        "eos_token": vocab[2],
        "pad_token": vocab[2],
        "chat_template": metadata["tokenizer.chat_template"],
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}\n')


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, Any],
    vocab: list[str],
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    types = list(metadata["tokenizer.ggml.token_type"])
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(vocab)
    writer.add_token_types(types + [int(gguf.TokenType.NORMAL)] * (len(vocab) - len(types)))
    writer.add_token_merges(list(metadata["tokenizer.ggml.merges"]))
    writer.add_add_bos_token(False)
    for name in _SPECIAL_IDS:
        writer.add_uint32(f"tokenizer.ggml.{name}", int(metadata[f"tokenizer.ggml.{name}"]))
    writer.add_chat_template(metadata["tokenizer.chat_template"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            writer.add_tensor(_gguf_name(name), tensor.float().numpy())
            continue
        for part, num_heads in heads.items():
            if part in name:
                tensor = _interleave(tensor, num_heads)
        raw = tensor.contiguous().view(torch.uint8).numpy()  # [rows, bytes]
        writer.add_tensor(
            _gguf_name(name), np.ascontiguousarray(raw), raw_dtype=gguf.GGMLQuantizationType.BF16
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows: GGUF rotates adjacent rows of a head, Hugging Face its two halves.

    Args:
        weight: [H * D, hidden].
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
