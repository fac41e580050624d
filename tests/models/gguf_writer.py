"""Writes GGUF files as llama.cpp's converter does: metadata, names and tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

PAIRED = ("arcee", "granite", "granitemoe", "llama", "smollm3")
"""Architectures whose query and key rows are stored as adjacent rotary pairs."""
HEAD_NORM = re.compile(r"(.*[qk]_layernorm)\.norms\.\d+\.weight")
EXPERTS = re.compile(r"(.*experts)\.(\d+)\.(\w+)\.weight")


def paired(weight: np.ndarray, num_heads: int) -> np.ndarray:
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    name: str,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    is_old: bool = False,
    experts: gguf.GGMLQuantizationType | None = None,
    linear: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write metadata and tensors of general.architecture `name`.

    Args:
        path: file to write.
        name: general.architecture.
        config: transformers' config of the model.
        tensors: the model's weights by their Hugging Face names.
        is_old: write DeepSeek's kv_b_proj as one tensor, as older converters did.
        experts: type of stacked expert weights; None: float32.
        linear: type of attention and feed-forward weights; None: float32.
    """
    arch = next(a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), name)
    add_metadata(writer, name, config)
    if name == "deepseek2":
        add_latent(writer, config, is_old=is_old)
    for hf_name, values in converted(name, config, tensors, is_old=is_old):
        if hf_name.startswith("rope_factors"):
            writer.add_tensor(hf_name, values)
            continue
        found = names.get_name(hf_name, (".weight", ".bias"))
        assert found is not None, hf_name
        kind = type_of(found, experts, linear)
        if kind is not None:
            writer.add_tensor(found, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def type_of(
    name: str,
    experts: gguf.GGMLQuantizationType | None,
    linear: gguf.GGMLQuantizationType | None,
) -> gguf.GGMLQuantizationType | None:
    if name.endswith("exps.weight"):
        return experts
    is_linear = re.fullmatch(r"blk\.\d+\.(attn|ffn)_(qkv|output|up|down)\.weight", name)
    return linear if is_linear else None


def add_metadata(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    """Write metadata from config.json, whose keys have different names in some families."""

    def first(*keys: str) -> Any:
        return next((v for k in keys if (v := getattr(config, k, None)) is not None), None)

    hidden, heads = config.hidden_size, config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    inner = first("ffn_hidden_size", "n_inner", "intermediate_size")
    writer.add_feed_forward_length(inner or 4 * hidden)
    writer.add_head_count(heads)
    is_single = name == "falcon" and not config.new_decoder_architecture
    if name != "deepseek2":
        kv_heads = first("num_kv_heads", "num_key_value_heads") or heads
        writer.add_head_count_kv(1 if is_single else kv_heads)
    if (eps := first("rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(eps)
    if (
        eps := first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    ) is not None:
        writer.add_layer_norm_eps(eps)
    if name != "deepseek2" and first("head_dim") and name != "falcon":
        writer.add_key_length(config.head_dim)
    for keys, add in (
        (("num_local_experts", "num_experts", "n_routed_experts"), writer.add_expert_count),
        (("num_experts_per_tok",), writer.add_expert_used_count),
        (("n_group",), writer.add_expert_group_count),
        (("topk_group",), writer.add_expert_group_used_count),
        (("attn_logit_softcapping",), writer.add_attn_logit_softcapping),
        (("final_logit_softcapping",), writer.add_final_logit_softcapping),
        (("attention_multiplier",), writer.add_attention_scale),
        (("embedding_multiplier",), writer.add_embedding_scale),
        (("residual_multiplier",), writer.add_residual_scale),
        (("logits_scaling", "logit_scale"), writer.add_logit_scale),
        (("moe_intermediate_size",), writer.add_expert_feed_forward_length),
        (
            ("shared_expert_intermediate_size",),
            writer.add_expert_shared_feed_forward_length,
        ),
    ):
        if (value := first(*keys)) is not None:
            add(value)
    if name == "exaone4" and config.sliding_window:
        writer.add_sliding_window_pattern([k == "sliding_attention" for k in config.layer_types])
    if name == "granitemoe":
        writer.add_expert_shared_feed_forward_length(first("shared_intermediate_size") or 0)
    if name in ("gemma2", "gemma3", "cohere2", "exaone4", "gpt-oss", "phi3", "olmo2"):
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if name == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if name in ("gptneox", "stablelm"):
        writer.add_parallel_residual(config.use_parallel_residual)
    add_rope(writer, name, config)


def add_rope(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = rope.get("full_attention", rope)
    if rope.get("rope_theta") and name != "gptneox":
        writer.add_rope_freq_base(rope["rope_theta"])
    if name in ("phi3", "gptneox", "phi2", "stablelm", "nemotron", "glm4"):
        share = rope.get("partial_rotary_factor", 1.0)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(share * size))
    if name == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        if rope.get("rope_type") == "longrope":
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if name == "deepseek2":
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def add_latent(writer: gguf.GGUFWriter, config: Any, *, is_old: bool) -> None:
    plain, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if is_old:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(plain + rotary)
        writer.add_value_length(config.v_head_dim)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + rotary)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(plain + rotary)
        writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rotary)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    if config.model_type == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def converted(
    name: str, config: Any, tensors: Mapping[str, torch.Tensor], *, is_old: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Convert each tensor, and name it as gguf's table expects."""
    stacks: dict[str, list[np.ndarray]] = {}
    for hf_name in sorted(
        tensors, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)]
    ):
        values = tensors[hf_name].float().numpy()
        if match := EXPERTS.fullmatch(hf_name):
            stack = f"{match[1]}.{match[3]}.weight"
            stack = stack.replace("model.layers", "layers") if name == "llama" else stack
            stack = stack.replace("block_sparse_moe", "feed_forward")
            stacks.setdefault(stack, []).append(values)
        elif name == "stablelm" and (norm := HEAD_NORM.fullmatch(hf_name)):
            stacks.setdefault(f"{norm[1]}.weight", []).append(values)
        elif name == "granitemoe" and hf_name.endswith("input_linear.weight"):
            yield from split_input(hf_name, values)
        elif name == "gpt-oss" and ".experts." in hf_name:
            yield from split_experts(hf_name, values)
        elif name == "deepseek2" and hf_name.endswith("kv_b_proj.weight") and not is_old:
            heads = values.reshape(config.num_key_value_heads, -1, values.shape[-1])
            keys, rest = np.split(heads, [config.qk_nope_head_dim], axis=1)
            yield hf_name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
            yield hf_name.replace("kv_b_proj", "v_b_proj"), rest
        else:
            yield renamed(hf_name), reshaped(name, config, hf_name, values)
    for stack, parts in stacks.items():
        yield stack, np.stack(parts)
    rope = getattr(config, "rope_parameters", None) or {}
    if name == "phi3" and rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32)


def renamed(hf_name: str) -> str:
    if hf_name.endswith("output_linear.weight"):
        stem = hf_name.replace("shared_mlp", "mlp.shared_expert")
        return stem.replace("block_sparse_moe", "mlp.experts").replace("output_linear", "down_proj")
    if hf_name.endswith("sinks"):
        return f"{hf_name}.weight"
    return hf_name.replace("e_score_correction_bias", "e_score_correction.bias")


def split_input(hf_name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split Granite's gate and up, which are one tensor, of all experts or of the shared one."""
    gate, up = np.split(values, 2, axis=-2)
    stem = hf_name.removesuffix("input_linear.weight")
    if "shared_mlp" in hf_name:
        stem = stem.replace("shared_mlp", "mlp.shared_expert")
    else:
        stem = stem.replace("block_sparse_moe", "mlp.experts")
    yield f"{stem}gate_proj.weight", gate
    yield f"{stem}up_proj.weight", up


def split_experts(hf_name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split GPT-OSS's stacked experts, whose rows alternate gate and up, stored columns first."""
    is_bias = hf_name.endswith("_bias")
    stem, suffix = hf_name.removesuffix("_bias"), "bias" if is_bias else "weight"
    rows = values if is_bias else values.swapaxes(1, 2)
    if stem.endswith("down_proj"):
        yield f"{stem}.{suffix}", rows
    else:
        yield f"{stem.replace('gate_up', 'gate')}.{suffix}", rows[:, 0::2]
        yield f"{stem.replace('gate_up', 'up')}.{suffix}", rows[:, 1::2]


def reshaped(name: str, config: Any, hf_name: str, values: np.ndarray) -> np.ndarray:
    layer = hf_name.rpartition(".")[0]
    if name.startswith(("gemma", "nemotron")) and hf_name.endswith("norm.weight"):
        return values + 1
    if name in PAIRED and layer.endswith("q_proj"):
        return paired(values, config.num_attention_heads)
    if name in PAIRED and layer.endswith("k_proj"):
        return paired(values, config.num_key_value_heads)
    if layer.endswith("query_key_value"):
        heads = config.num_attention_heads
        if name == "falcon":
            groups = config.num_kv_heads if config.new_decoder_architecture else 1
        else:
            groups = heads
        by_group = values.reshape(groups, heads // groups + 2, -1, *values.shape[1:])
        parts = (by_group[:, :-2], by_group[:, -2], by_group[:, -1])
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    if name == "gpt2" and hf_name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
        return values.T
    return values.squeeze() if layer.endswith("shared_expert_gate") else values
