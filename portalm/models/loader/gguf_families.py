"""What GGUF files call the architectures, tensors and values that Hugging Face has other names for.

The names, and what conversion does to tensors, are llama.cpp's (its gguf package has the table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
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
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_VALUES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """One value of general.architecture."""

    architecture: str
    """The name in config.json."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Of a layer's tensors, where they are not Llama's."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Of config.json: the metadata's key, without the architecture."""
    is_paired: bool = False
    """Rotary pairs lie side by side in the rows of query and key."""
    is_shifted: bool = False
    """Norms' weights are those of the checkpoint plus 1."""
    widest_layers: int | None = None
    """Of models of so many layers scores are scaled by the hidden size over the heads instead of
    the head size: a rule that llama.cpp knows, and files do not say."""

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor; None for one that models do not read."""
        stem, _, suffix = name.rpartition(".")
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{suffix}"
        parts = stem.split(".")
        if len(parts) != 3 or parts[0] != "blk":
            return None
        found = self.names.get(parts[2]) or _LAYER_NAMES.get(parts[2])
        return None if found is None else f"model.layers.{parts[1]}.{found}.{suffix}"

    def hf_values(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json has of this family beyond what all have."""
        prefix = metadata["general.architecture"]
        get = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}.get
        values = {name: get(key) for name, key in self.values.items()}
        if self.widest_layers is not None:
            is_widest = get("block_count") == self.widest_layers
            heads = int(get("attention.head_count", 1))
            wide, usual = int(get("embedding_length", 0)) // heads, get("attention.key_length")
            values["query_pre_attn_scalar"] = wide if is_widest else usual
        return {name: value for name, value in values.items() if value is not None}


FAMILIES = {
    "llama": GGUFFamily(architecture="LlamaForCausalLM", is_paired=True),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "smollm3": GGUFFamily(architecture="SmolLM3ForCausalLM", is_paired=True),
    "granite": GGUFFamily(
        architecture="GraniteForCausalLM",
        is_paired=True,
        values={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "logits_scaling": "logit_scale",
            "residual_multiplier": "residual_scale",
        },
    ),
    "gemma": GGUFFamily(architecture="GemmaForCausalLM", is_shifted=True),
    "gemma2": GGUFFamily(
        architecture="Gemma2ForCausalLM",
        names=_GEMMA_NAMES,
        values=_GEMMA_VALUES,
        is_shifted=True,
        widest_layers=46,
    ),
    "gemma3": GGUFFamily(
        architecture="Gemma3ForCausalLM",
        names=_GEMMA_NAMES,
        values=_GEMMA_VALUES,
        is_shifted=True,
        widest_layers=62,
    ),
}
"""By general.architecture."""
