"""Families that transformers has no code for, in the form in which they were published.

Each is a model that transformers has, under other names, in another layout or with other settings:
the random weights of that model are rewritten to the published form, and the answers compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from portalm.errors import UnsupportedModel
from portalm.models.falcon import alibi_slopes
from tests.models.test_families import PROMPTS, TINY, Case, engine_of
from tests.tiny import ask, make_config_folder, run, tokens

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """A published form of a model of transformers."""

    base: Case
    architecture: str
    convert: Callable[[Tensors], Tensors]
    """From the base model's tensors to the published ones."""
    changes: dict[str, Any]
    """Values of the published config.json; None: the key is absent."""


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Replace each part of a name by another."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = tensor.contiguous()
    return result


def merged(tensors: Tensors, parts: tuple[str, ...], name: str) -> Tensors:
    """Concatenate the rows of layers with the names `parts`."""
    result = {n: t for n, t in tensors.items() if not any(f".{p}." in n for p in parts)}
    for first in [n for n in tensors if f".{parts[0]}." in n]:
        rows = [tensors[first.replace(f".{parts[0]}.", f".{p}.")] for p in parts]
        result[first.replace(f".{parts[0]}.", f".{name}.")] = torch.cat(rows)
    return result


QKV = ("q_proj", "k_proj", "v_proj")


def internlm2(tensors: Tensors) -> Tensors:
    tensors = merged(tensors, QKV, "wqkv")
    for name, tensor in tensors.items():
        if ".wqkv." in name:  # queries of a KV head, its key, its value
            query, key, value = tensor.split((64, 32, 32))
            groups = (query.view(2, 32, -1), key.view(2, 16, -1), value.view(2, 16, -1))
            tensors[name] = torch.cat(groups, dim=1).reshape(128, *tensor.shape[1:])
    return renamed(
        tensors,
        {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention",
         "o_proj": "wo", "input_layernorm": "attention_norm", "mlp.gate_proj": "feed_forward.w1",
         "post_attention_layernorm": "ffn_norm", "mlp.up_proj": "feed_forward.w3",
         "mlp.down_proj": "feed_forward.w2"},
    )  # fmt: skip


def chatglm(tensors: Tensors) -> Tensors:
    tensors = merged(tensors, QKV, "query_key_value")
    result = renamed(
        tensors,
        {"model.embed_tokens": "transformer.embedding.word_embeddings",
         "lm_head": "transformer.output_layer", "model.norm": "transformer.encoder.final_layernorm",
         "model.layers": "transformer.encoder.layers", "self_attn": "self_attention",
         "o_proj": "dense", "gate_up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"},
    )  # fmt: skip
    return {**result, "transformer.rotary_pos_emb.inv_freq": torch.ones(6)}


def baichuan(tensors: Tensors) -> Tensors:
    return merged(tensors, QKV, "W_pack")


def baichuan2(tensors: Tensors) -> Tensors:
    """The base model's head has rows of length 1; the published one is normalized at load."""
    scale = torch.linspace(0.5, 3.0, 128)[:, None]
    return {**baichuan(tensors), "lm_head.weight": tensors["lm_head.weight"] * scale}


def mimo(tensors: Tensors) -> Tensors:
    return {**tensors, "model.mtp_layers.0.input_proj.weight": torch.ones(4, 4)}


GLM_KEYS = {
    "add_qkv_bias": True,
    "ffn_hidden_size": 96,
    "intermediate_size": None,
    "kv_channels": 24,
    "layernorm_epsilon": 1e-5,
    "max_position_embeddings": None,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_hidden_layers": None,
    "num_key_value_heads": None,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 128,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 50,
    "seq_length": 256,
    "vocab_size": None,
}
NO_HEADS = {"num_key_value_heads": 4}

FORMS = {
    "internlm2": Form(Case("Llama"), "InternLM2ForCausalLM", internlm2, {"bias": False}),
    "internlm3": Form(
        Case("Llama", {"head_dim": 24}),
        "InternLM3ForCausalLM",
        lambda tensors: tensors,
        {"bias": False, "head_dim": 24, "qkv_bias": False},
    ),
    "internlm3 with biases": Form(
        Case("Llama", {"attention_bias": True, "mlp_bias": True}),
        "InternLM3ForCausalLM",
        lambda tensors: tensors,
        {"bias": True, "qkv_bias": True},
    ),
    "mimo": Form(
        Case("Qwen2"),
        "MiMoForCausalLM",
        mimo,
        {"attention_bias": True, "num_nextn_predict_layers": 1},
    ),
    "minicpm": Form(
        Case(
            "Granite",
            {
                "attention_multiplier": 0.25,
                "embedding_multiplier": 12.0,
                "logits_scaling": 4.0,
                "residual_multiplier": 1.4 / math.sqrt(2),
            },
        ),
        "MiniCPMForCausalLM",
        lambda tensors: tensors,
        {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12, "tie_word_embeddings": False},
    ),
    "chatglm": Form(
        Case("Glm", {"head_dim": 24, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}),
        "ChatGLMModel",
        chatglm,
        GLM_KEYS,
    ),
    "baichuan 7b": Form(Case("Llama", NO_HEADS), "BaiChuanForCausalLM", baichuan, NO_HEADS),
    "baichuan2 7b": Form(
        Case("Llama", NO_HEADS),
        "BaichuanForCausalLM",
        baichuan2,
        {**NO_HEADS, "z_loss_weight": 0},
    ),
}


def write(folder: Path, form: Form, model: Any) -> None:
    """Write the published form of the model's weights and config."""
    values = {**TINY, "rms_norm_eps": 1e-6, "torch_dtype": "float32", **form.changes}
    values = {key: value for key, value in values.items() if value is not None}
    values["architectures"] = [form.architecture]
    (folder / "config.json").write_text(json.dumps(values))
    state = {n: t for n, t in model.state_dict().items() if "inv_freq" not in n}
    save_file({n: t.contiguous() for n, t in form.convert(state).items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


def answers(folder: Path, **settings: Any) -> dict[str, list[int]]:
    engine = engine_of(folder, device="reference", max_model_len=128, **settings)
    for key, prompt in PROMPTS.items():
        ask(engine, key, prompt, max_tokens=16)
    return tokens(run(engine))


@pytest.mark.parametrize("name", FORMS)
def test_answers_equal_those_of_the_base_model(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    model = form.base.make()
    if name.startswith("baichuan2"):
        model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data)
    write(tmp_path, form, model)

    sampled = answers(tmp_path)

    for key, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled[key]])).logits[0]
        assert sampled[key] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), key


def test_baichuan_13b_has_alibi_instead_of_a_rotary_embedding(tmp_path: Path) -> None:
    """The base model gets ALiBi as an additive mask, and position 0 everywhere: no rotation."""
    sizes = {"hidden_size": 320, "num_attention_heads": 40, "num_key_value_heads": 40}
    base = Case("Llama", {**sizes, "attn_implementation": "eager"})
    model = base.make()
    changes = {**sizes, "max_position_embeddings": None, "model_max_length": 256}
    write(tmp_path, Form(base, "BaichuanForCausalLM", baichuan, changes), model)

    sampled = answers(tmp_path)

    for key, prompt in PROMPTS.items():
        ids = prompt + sampled[key]
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        bias = torch.tensor(alibi_slopes(40))[:, None, None] * -distance
        bias = bias.masked_fill(distance < 0, float("-inf"))[None]  # [1, H, T, T]
        with torch.inference_mode():
            zeros = torch.zeros((1, len(ids)), dtype=torch.long)
            logits = model(torch.tensor([ids]), attention_mask=bias, position_ids=zeros).logits[0]
        assert sampled[key] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), key


def decilm(model: Any, layers: list[tuple[bool, int]]) -> Tensors:
    """Drop parts of layers, given as (has attention, width), and zero them in the base model."""
    kept = {}
    for i, (has_attention, width) in enumerate(layers):
        layer = model.model.layers[i]
        if not has_attention:
            layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data[:, width:] = 0
    for name, tensor in model.state_dict().items():
        found = name.split(".")
        if found[1] == "layers":
            has_attention, width = layers[int(found[2])]
            if not has_attention and found[3] in ("self_attn", "input_layernorm"):
                continue
            if width == 0 and found[3] in ("mlp", "post_attention_layernorm"):
                continue
            if found[3] == "mlp":
                tensor = tensor[:, :width] if found[4] == "down_proj" else tensor[:width]
        kept[name] = tensor.contiguous()
    return kept


@pytest.mark.parametrize("key", ["ffn_mult", "intermediate_size"])
def test_decilm_has_layers_without_attention_or_feed_forward(tmp_path: Path, key: str) -> None:
    layers = [(True, 256), (False, 512), (True, 0), (False, 0), (True, 512)]
    base = Case("Llama", {"intermediate_size": 512, "num_hidden_layers": 5})
    model = base.make()
    blocks = [
        {
            "attention": {"n_heads_in_group": 2 if has_attention else None,
                          "no_op": not has_attention, "replace_with_linear": False},
            "ffn": {key: (width if key == "intermediate_size" else width * 1.4 / 64) or None,
                    "no_op": width == 0, "replace_with_linear": False},
        }
        for has_attention, width in layers
    ]  # fmt: skip
    changes = {"block_configs": blocks, "intermediate_size": None, "num_hidden_layers": 5,
               "num_key_value_heads": None}  # fmt: skip
    form = Form(base, "DeciLMForCausalLM", lambda _: decilm(model, layers), changes)
    write(tmp_path, form, model)

    sampled = answers(tmp_path)

    for name, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled[name]])).logits[0]
        assert sampled[name] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), name


BLOCK: dict[str, Any] = {"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 64}}


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("MiniCPMForCausalLM", {"sparse_config": {"topk": 64}}, "sparse_config is set"),
        ("MiniCPMForCausalLM", {"num_experts": 8}, "num_experts is 8"),
        ("ChatGLMModel", {**GLM_KEYS, "rmsnorm": False}, "rmsnorm is False"),
        ("BaichuanForCausalLM", {"num_attention_heads": 40, "hidden_size": 160,
                                 "num_key_value_heads": 40, "head_dim": 4}, "13B models 40 heads"),
        (
            "DeciLMForCausalLM",
            {"block_configs": [BLOCK, {**BLOCK, "attention": {"n_heads_in_group": 4}}]},
            "caches would too",
        ),
        (
            "DeciLMForCausalLM",
            {"block_configs": [BLOCK, {**BLOCK, "ffn": {"replace_with_linear": True}}]},
            "ffn of layer 1 in block_configs has replace_with_linear",
        ),
    ],
)  # fmt: skip
def test_settings_that_a_family_does_not_support_are_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    values = {"architectures": [architecture], "num_hidden_layers": 2, **changes}
    folder = make_config_folder(tmp_path, **{k: v for k, v in values.items() if v is not None})

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(folder, device="reference", load_format="dummy")
