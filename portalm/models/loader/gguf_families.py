"""Maps architectures, tensors and metadata of GGUF files to Hugging Face's names.

GGUF names are those of the gguf package; the forms of tensors are those that llama.cpp's converter
writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from portalm.models.loader.checkpoint import HF_FORM, StoredForm
from portalm.models.registry import model_class

if TYPE_CHECKING:
    from portalm.models.decoder import Decoder

Get = Callable[[str], Any]
"""Returns a metadata value by its key without the architecture; None: the file has none."""
Derive = Callable[[Get, Collection[str]], dict[str, Any]]
"""Computes values of config.json from the metadata and the names of the file's tensors."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NAMES = {**_POST_NORM_NAMES, "ffn_norm": "pre_feedforward_layernorm"}
_GEMMA_VALUES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}
_EXPERT_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_QWEN_MOE_VALUES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
}
_GRANITE_VALUES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale",
}
_NEOX_NAMES = {
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_NAMES = {
    **_NEOX_NAMES,
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
}
_ALWAYS_BIASED = {"attention_bias": False}
"""For families whose config.json has no attention_bias, though their layers have biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """The mapping of one general.architecture, or of one of several families that share it."""

    architecture: str
    """Architecture name in config.json."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensor names in the file -> Hugging Face's, where they differ from Llama's; {} is replaced by
    an expert's number. Both are without .weight or .bias, except where only one suffix is meant."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json -> keys of the metadata, without the architecture."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json that all models of the family have, and that files do not store."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    """Values of rope_scaling that all models of the family have, and that files do not store."""
    derive: Derive | None = None
    """Values of config.json that no single metadata key holds."""
    form: StoredForm = HF_FORM
    """Which tensors the file stores in the model's form."""
    has_paired_rows: bool = False
    """Rotary pairs are adjacent rows of query and key weights; the reader reorders them."""
    rotates_part: bool = False
    """The rotary embedding may apply to part of a head."""

    def hf_name(self, name: str) -> str | None:
        """Map a tensor name of the file to Hugging Face's; None: models do not read the tensor.

        A result with {} is a stack of all experts' tensors; {} is the expert's number.
        """
        model = cast("type[Decoder]", model_class(self.architecture))
        stem, _, suffix = name.rpartition(".")
        global_names = {
            "token_embd": model.embedding, "output_norm": model.last_norm, "output": model.head,
            **self.names,
        }  # fmt: skip
        match stem.split("."):
            case [part] if part in global_names:
                return f"{global_names[part]}.{suffix}"
            case ["blk", layer, part] if layer.isdecimal():
                found = self._part_name(part, suffix)
            case ["blk", layer, part, expert] if layer.isdecimal() and expert.isdecimal():
                # older files have a tensor for each expert
                found = self._part_name(f"{part}_exps", suffix)
                found = None if found is None else found.format(expert)
            case _:
                return None
        return None if found is None else f"{model.layer_prefix}{layer}.{found}"

    def _part_name(self, part: str, suffix: str) -> str | None:
        if f"{part}.{suffix}" in self.names:
            return self.names[f"{part}.{suffix}"]
        found = self.names.get(part) or _LAYER_NAMES.get(part)
        return None if found is None else f"{found}.{suffix}"

    def hf_values(self, get: Get, names: Collection[str]) -> dict[str, Any]:
        """Values of config.json that only this family has."""
        found = {name: get(key) for name, key in self.values.items()}
        if self.derive is not None:
            found |= self.derive(get, names)
        return {**self.constants, **{k: value for k, value in found.items() if value is not None}}


def _query_scalar(widest: int) -> Derive:
    """Derive query_pre_attn_scalar, which files do not store, as llama.cpp does.

    It is the head size, except in the model with `widest` layers: there it is hidden size / heads.
    """

    def derive(get: Get, names: Collection[str]) -> dict[str, Any]:
        if get("block_count") != widest:
            return {"query_pre_attn_scalar": get("attention.key_length")}
        return {"query_pre_attn_scalar": get("embedding_length") // get("attention.head_count")}

    return derive


_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Number of experts -> groups of experts, and groups per token, of DeepSeek-V2 and V3; for files
that do not store them."""


def _deepseek(get: Get, names: Collection[str]) -> dict[str, Any]:
    """Derive DeepSeek's head sizes and routing.

    Newer files describe attention as one head that is the latent vector, and store the sizes of the
    actual heads under keys that end with _mla.
    """
    key = get("attention.key_length_mla") or get("attention.key_length")
    groups, chosen = get("expert_group_count"), get("expert_group_used_count")
    if groups is None:
        groups, chosen = _GROUPS.get(get("expert_count"), (1, 1))
    is_v3 = get("expert_gating_func") == _SIGMOID
    by_softmax = "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "qk_nope_head_dim": key - get("rope.dimension_count"),
        "v_head_dim": get("attention.value_length_mla") or get("attention.value_length"),
        "q_lora_rank": get("attention.q_lora_rank") or 0,
        "n_group": groups,
        "topk_group": chosen,
        "topk_method": "noaux_tc" if is_v3 else by_softmax,
    }


_SIGMOID = 2
"""Value of expert_gating_func for sigmoid."""


def _falcon(get: Get, names: Collection[str]) -> dict[str, Any]:
    is_new = get("attention.head_count_kv") != 1
    num_norms = 2 if "blk.0.attn_norm_2.weight" in names else 1
    return {"new_decoder_architecture": is_new, "num_ln_in_parallel_attn": num_norms}


def _command_r(get: Get, names: Collection[str]) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in names}


def _seed_oss(get: Get, names: Collection[str]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "attention_out_bias": "blk.0.attn_output.bias" in names,
    }


def _stablelm(get: Get, names: Collection[str]) -> dict[str, Any]:
    return {
        "qk_layernorm": "blk.0.attn_q_norm.weight" in names,
        "use_qkv_bias": "blk.0.attn_q.bias" in names,
    }


def _ernie(get: Get, names: Collection[str]) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": "blk.0.attn_output.bias" in names,
    }


def _no_gate(get: Get, names: Collection[str]) -> dict[str, Any]:
    """Derive mlp_bias of a feed-forward without a gate."""
    return {"mlp_bias": "blk.0.ffn_up.bias" in names}


def _glm4(get: Get, names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in names}


_DEEPSEEK: dict[str, Any] = {
    "names": {
        **_EXPERT_NAMES,
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b_proj",
        "attn_v_b": "self_attn.v_b_proj",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    },
    "values": {
        "first_k_dense_replace": "leading_dense_block_count",
        "kv_lora_rank": "attention.kv_lora_rank",
        "moe_intermediate_size": "expert_feed_forward_length",
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "norm_topk_prob": "expert_weights_norm",
        "num_experts_per_tok": "expert_used_count",
        "qk_rope_head_dim": "rope.dimension_count",
        "routed_scaling_factor": "expert_weights_scale",
    },
    "derive": _deepseek,
}

FAMILIES = {
    "llama": GGUFFamily(architecture="LlamaForCausalLM", has_paired_rows=True),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen2moe": GGUFFamily(
        architecture="Qwen2MoeForCausalLM",
        names={
            **_EXPERT_NAMES,
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        values={
            **_QWEN_MOE_VALUES,
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
    ),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "qwen3moe": GGUFFamily(
        architecture="Qwen3MoeForCausalLM",
        names=_EXPERT_NAMES,
        values=_QWEN_MOE_VALUES,
        constants={"norm_topk_prob": True},
    ),
    "gpt-oss": GGUFFamily(
        architecture="GptOssForCausalLM",
        names={
            **_EXPERT_NAMES,
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "post_attention_norm": "post_attention_layernorm",
        },
        values={
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "sliding_window": "attention.sliding_window",
        },
        form=StoredForm(has_separate_experts=True),
        scaling={"truncate": False},
    ),
    "deepseek2": GGUFFamily(architecture="DeepseekV2ForCausalLM", **_DEEPSEEK),
    "smollm3": GGUFFamily(architecture="SmolLM3ForCausalLM", has_paired_rows=True),
    "granite": GGUFFamily(
        architecture="GraniteForCausalLM",
        has_paired_rows=True,
        values=_GRANITE_VALUES,
    ),
    "gemma": GGUFFamily(architecture="GemmaForCausalLM", form=StoredForm(has_full_norms=True)),
    "gemma2": GGUFFamily(
        architecture="Gemma2ForCausalLM",
        names=_GEMMA_NAMES,
        values=_GEMMA_VALUES,
        form=StoredForm(has_full_norms=True),
        derive=_query_scalar(widest=46),
    ),
    "gemma3": GGUFFamily(
        architecture="Gemma3ForCausalLM",
        names=_GEMMA_NAMES,
        values={**_GEMMA_VALUES, "rope_local_base_freq": "rope.freq_base_swa"},
        form=StoredForm(has_full_norms=True),
        derive=_query_scalar(widest=62),
    ),
    "phi3": GGUFFamily(
        architecture="Phi3ForCausalLM",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        values={"sliding_window": "attention.sliding_window"},
        rotates_part=True,
    ),
    "olmo2": GGUFFamily(architecture="Olmo2ForCausalLM", names=_POST_NORM_NAMES),
    "olmoe": GGUFFamily(
        architecture="OlmoeForCausalLM",
        names=_EXPERT_NAMES,
        values={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        constants={"norm_topk_prob": False},
    ),
    "seed_oss": GGUFFamily(
        architecture="SeedOssForCausalLM",
        names={"post_attention_norm": "post_attention_layernorm"},
        derive=_seed_oss,
    ),
    "nemotron": GGUFFamily(
        architecture="NemotronForCausalLM",
        form=StoredForm(has_full_norms=True),
        derive=_no_gate,
        rotates_part=True,
    ),
    "stablelm": GGUFFamily(
        architecture="StableLmForCausalLM",
        names={
            "attn_q_norm": "self_attn.q_layernorm.norms",
            "attn_k_norm": "self_attn.k_layernorm.norms",
        },
        values={"use_parallel_residual": "use_parallel_residual"},
        form=StoredForm(has_stacked_norms=True),
        derive=_stablelm,
        rotates_part=True,
    ),
    "ernie4_5": GGUFFamily(architecture="Ernie4_5ForCausalLM", derive=_ernie),
    "hunyuan-dense": GGUFFamily(
        architecture="HunYuanDenseV1ForCausalLM",
        names={
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
    ),
    "phi2": GGUFFamily(
        architecture="PhiForCausalLM",
        names={"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        constants=_ALWAYS_BIASED,
        rotates_part=True,
    ),
    "arcee": GGUFFamily(architecture="ArceeForCausalLM", derive=_no_gate, has_paired_rows=True),
    "exaone4": GGUFFamily(
        architecture="Exaone4ForCausalLM",
        names=_POST_NORM_NAMES,
        values={"sliding_window": "attention.sliding_window"},
    ),
    "glm4": GGUFFamily(
        architecture="Glm4ForCausalLM",
        names={
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
        derive=_glm4,
        rotates_part=True,
    ),
    "granitemoe": GGUFFamily(
        architecture="GraniteMoeSharedForCausalLM",
        names={
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_exps": "block_sparse_moe.experts.{}.gate_proj",
            "ffn_up_exps": "block_sparse_moe.experts.{}.up_proj",
            "ffn_down_exps": "block_sparse_moe.experts.{}.down_proj",
            "ffn_gate_shexp": "shared_mlp.gate_proj",
            "ffn_up_shexp": "shared_mlp.up_proj",
            "ffn_down_shexp": "shared_mlp.down_proj",
        },
        values={
            **_GRANITE_VALUES,
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "shared_intermediate_size": "expert_shared_feed_forward_length",
        },
        form=StoredForm(has_separate_experts=True),
        has_paired_rows=True,
    ),
    "starcoder2": GGUFFamily(
        architecture="Starcoder2ForCausalLM",
        names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        values={"sliding_window": "attention.sliding_window"},
        constants={**_ALWAYS_BIASED, "sliding_window": 4096},
    ),
    "command-r": GGUFFamily(
        architecture="CohereForCausalLM", values={"logit_scale": "logit_scale"}, derive=_command_r
    ),
    "cohere2": GGUFFamily(
        architecture="Cohere2ForCausalLM",
        values={"logit_scale": "logit_scale", "sliding_window": "attention.sliding_window"},
    ),
    "falcon": GGUFFamily(
        architecture="FalconForCausalLM",
        names=_FALCON_NAMES,
        derive=_falcon,
        form=StoredForm(has_model_row_order=True),
    ),
    "gptneox": GGUFFamily(
        architecture="GPTNeoXForCausalLM",
        names={
            **_NEOX_NAMES,
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
        },
        values={"use_parallel_residual": "use_parallel_residual"},
        form=StoredForm(has_model_row_order=True),
        rotates_part=True,
    ),
    "gpt2": GGUFFamily(
        architecture="GPT2LMHeadModel",
        names={
            "position_embd": "transformer.wpe",
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        constants=_ALWAYS_BIASED,
        form=StoredForm(has_rows_first=True),
    ),
}
"""Families by general.architecture."""

_MIXTRAL = GGUFFamily(
    architecture="MixtralForCausalLM",
    names={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    values={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    has_paired_rows=True,
)
_DEEPSEEK_V3 = GGUFFamily(architecture="DeepseekV3ForCausalLM", **_DEEPSEEK)
_FALCON_40B = GGUFFamily(
    architecture="FalconForCausalLM",
    names={**_FALCON_NAMES, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
    derive=_falcon,
    form=StoredForm(has_model_row_order=True),
)


def find_family(architecture: str, get: Get, names: Collection[str]) -> GGUFFamily | None:
    """Find a file's family by its general.architecture, metadata and tensor names."""
    if architecture == "llama" and get("expert_count"):
        return _MIXTRAL
    if architecture == "deepseek2" and get("expert_gating_func") == _SIGMOID:
        return _DEEPSEEK_V3
    if architecture == "falcon" and "blk.0.attn_norm_2.weight" in names:
        return _FALCON_40B
    return FAMILIES.get(architecture)
