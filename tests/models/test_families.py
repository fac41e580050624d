"""Every decoder family compared with transformers, on tiny random checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.decoder import Decoder
from portalm.models.loader.config_json import model_config
from portalm.models.registry import ARCHITECTURES, model_class
from portalm.models.small_config import randomize
from tests.tiny import ask, make_config_folder, run, tokens

PROMPTS = {str(n): [(7 * n + i * i) % 120 for i in range(n)] for n in (1, 17, 33, 90)}
NUM_OUT = 64

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """A family, by the prefix of its classes in transformers, and values of a small config."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str = "{}ForCausalLM"
    config: str = "{}Config"

    def make_config(self) -> Any:
        """Create transformers' config."""
        import transformers

        config_class = getattr(transformers, self.config.format(self.family))
        return config_class(**{**TINY, **self.changes})

    def make(self) -> Any:
        """Create a model with random weights, wide enough that no two logits are equal."""
        import transformers

        torch.manual_seed(0)
        config = self.make_config()
        model = getattr(transformers, self.model.format(self.family))(config).eval()
        randomize(model)
        return model


LATENT = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
}
"""Values of DeepSeek's config; no size is twice another, so that a mix-up fails."""

GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.5,
    "logits_scaling": 3.0,
    "num_experts_per_tok": 2,
    "residual_multiplier": 0.7,
}

CASES = {
    "mistral": Case("Mistral", {"sliding_window": 24}),
    "mistral without a window": Case("Mistral", {"sliding_window": None}),
    "qwen2": Case("Qwen2"),
    "qwen2 with windows": Case(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "phi3": Case("Phi3", {"sliding_window": 40}),
    "phi4": Case(
        "Phi3",
        {
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "gemma": Case("Gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": Case("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 24}),
    "gemma3": Case(
        "Gemma3",
        {"head_dim": 32, "sliding_window": 24, "num_hidden_layers": 3, "sliding_window_pattern": 3},
        config="{}TextConfig",
    ),
    "gpt2": Case(
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96},
        model="{}LMHeadModel",
    ),
    "gpt_neox": Case("GPTNeoX"),
    "gpt_neox, one after the other": Case(
        "GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0}
    ),
    "falcon": Case("Falcon", {"ffn_hidden_size": 96}),
    "falcon 40b": Case(
        "Falcon", {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon 11b": Case(
        "Falcon",
        {
            "ffn_hidden_size": 96,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon rw": Case(
        "Falcon",
        {
            "alibi": True,
            "bias": True,
            "ffn_hidden_size": 96,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "glm": Case("Glm", {"head_dim": 24}),
    "glm4": Case("Glm4", {"head_dim": 24}),
    "starcoder2": Case("Starcoder2", {"sliding_window": 24}),
    "olmo2": Case("Olmo2"),
    "exaone4": Case("Exaone4", {"sliding_window": 24, "sliding_window_pattern": 2}),
    "exaone4 without a window": Case(
        "Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    ),
    "arcee": Case("Arcee", {"mlp_bias": True}),
    "smollm3": Case("SmolLM3", {"no_rope_layer_interval": 2}),
    "granite": Case(
        "Granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.5,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.7,
        },
    ),
    "mixtral": Case("Mixtral", {"num_local_experts": 4}),
    "qwen2 moe": Case(
        "Qwen2Moe",
        {
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "qwen3 moe": Case(
        "Qwen3Moe",
        {
            "mlp_only_layers": [1],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
        },
    ),
    "gpt_oss": Case(
        "GptOss",
        {
            "head_dim": 16,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "sliding_window": 24,
            "swiglu_limit": 1.5,
        },
    ),
    "deepseek v2": Case("DeepseekV2", {**LATENT, "num_experts_per_tok": 3, "q_lora_rank": None}),
    "deepseek v2 with groups": Case(
        "DeepseekV2",
        {
            **LATENT,
            "n_group": 4,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek v3": Case(
        "DeepseekV3",
        {
            **LATENT,
            "attention_bias": True,
            "n_group": 4,
            "num_experts_per_tok": 3,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
            },
            "topk_group": 2,
        },
    ),
    "deepseek v3, halves rotated": Case(
        "DeepseekV3",
        {
            **LATENT,
            "n_group": 1,
            "num_experts_per_tok": 2,
            "rope_interleave": False,
            "topk_group": 1,
        },
    ),
    "minicpm3": Case(
        "MiniCPM3",
        {
            "dim_model_base": 32,
            "kv_lora_rank": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 16,
            "scale_depth": 1.4,
            "scale_emb": 3,
            "v_head_dim": 20,
        },
    ),
    "cohere": Case("Cohere"),
    "command r+": Case("Cohere", {"use_qk_norm": True}),
    "olmo3": Case(
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 500_000.0,
                    "original_max_position_embeddings": 64,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "attention_factor": 1.2,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "seed oss": Case("SeedOss", {"head_dim": 24, "attention_out_bias": True}),
    "stablelm": Case("StableLm", {"use_qkv_bias": True}),
    "stablelm 12b": Case("StableLm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "nemotron": Case("Nemotron", {"head_dim": 24, "mlp_bias": True}),
    "olmoe": Case("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "granite moe": Case("GraniteMoe", {**GRANITE, "num_local_experts": 4}),
    "granite moe, shared": Case(
        "GraniteMoeShared", {**GRANITE, "num_local_experts": 4, "shared_intermediate_size": 48}
    ),
    "granite 4": Case(
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 4,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 48,
        },
    ),
    "granite 4, dense": Case(
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "glm4 moe": Case(
        "Glm4Moe",
        {
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "head_dim": 24,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "topk_group": 1,
            "use_qk_norm": True,
        },
    ),
    "minimax m2": Case(
        "MiniMaxM2", {"head_dim": 32, "num_experts_per_tok": 2, "num_local_experts": 4}
    ),
    "ernie": Case("Ernie4_5", {"head_dim": 24, "use_bias": True}),
    "ernie moe": Case(
        "Ernie4_5_Moe",
        {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 6, "num_hidden_layers": 3},
    ),
    "phi": Case("Phi"),
    "phimoe": Case(
        "Phimoe",
        {
            "attention_bias": True,
            "lm_head_bias": True,
            "num_local_experts": 4,
            "router_jitter_noise": 0.2,
            "sliding_window": 24,
        },
    ),
    "apertus": Case("Apertus"),
    "ministral3": Case(
        "Ministral3",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "hunyuan": Case("HunYuanDenseV1", {"head_dim": 24}),
    "hunyuan, a longer context": Case(
        "HunYuanDenseV1",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 50.0,
                "factor": 1.0,
                "rope_theta": 10_000.0,
            },
        },
    ),
    "cohere2": Case("Cohere2", {"num_hidden_layers": 4, "sliding_window": 24}),
}


def engine_of(folder: Path, **settings: Any) -> Engine:
    values = {"model": str(folder), "max_num_seqs": 8, "max_num_batched_tokens": 48, **settings}
    return Engine(EngineConfig.from_dict(values))


def computed(values: dict[str, Any]) -> dict[str, Any]:
    """What a decoder computes for the `values` of a config.json."""
    config = model_config(values, {})
    model = model_class(config.architecture)(config, "float32")
    assert isinstance(model, Decoder), "models/registry.py has no line for it"
    return {
        "activation": config.values.get("hidden_act", "silu"),
        "attention": model.attention_specs(),
        "eps": config.norm_eps,
        "ropes": [replace(r, rotary_dim=r.rotary_dim or config.head_size) for r in model.ropes()],
        "scales": (model.embedding_scale, model.logit_scale, model.logit_cap),
        "shapes": model.shapes(),
    }


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_answers_equal_transformers(tmp_path: Path, name: str, device: str) -> None:
    model = CASES[name].make()
    assert type(model).__name__ in ARCHITECTURES, "models/registry.py has no line for it"
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, device=device, max_model_len=200)

    for key, prompt in PROMPTS.items():  # a mixed batch, in chunks of at most 48 tokens
        ask(engine, key, prompt, max_tokens=NUM_OUT, prompt_logprobs=0)
    outputs = run(engine)
    for key, prompt in PROMPTS.items():  # prefix hits, except for their last blocks
        ask(engine, key, prompt)
    again = tokens(run(engine))
    ask(engine, "33", PROMPTS["33"], max_tokens=NUM_OUT)
    alone = tokens(run(engine))["33"]

    sampled = tokens(outputs)
    assert engine.stats().prefix_hits_total > 0
    assert again == {key: sampled[key][:8] for key in sampled}
    assert alone == sampled["33"]
    for key, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled[key]])).logits[0].double()
        assert sampled[key] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), key
        expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]
        actual = [e.logprob for o in outputs[key] for e in o.prompt_logprobs or []]
        if len(prompt) > 1:
            difference = torch.tensor(actual, dtype=torch.float64) - expected
            error = float(difference.square().sum() / expected.square().sum())
            assert error < 1e-10, (key, error)


@pytest.mark.parametrize("name", CASES)
def test_defaults_of_a_config_are_those_of_transformers(name: str) -> None:
    case = CASES[name]
    architecture = {"architectures": [case.model.format(case.family)]}
    all_values = case.make_config().to_dict()

    ours = computed({**TINY, **case.changes, **architecture})

    assert ours == computed({**all_values, **architecture})


def test_tensor_names_without_the_optional_prefix_are_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = CASES["gpt2"].make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    engine = engine_of(tmp_path, device="reference")

    ask(engine, "a", PROMPTS["17"])
    [sampled] = tokens(run(engine)).values()

    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["17"] + sampled])).logits[0]
    assert sampled == logits[16:-1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("LlamaForCausalLM", {"sliding_window": 64}, "sliding_window is 64"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act 'relu'.*supported: silu"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen3ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "window is not set"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional"),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        (
            "Exaone4ForCausalLM",
            {"sliding_window_pattern": "LLLG"},
            "'LLLG' is not supported without",
        ),
        ("GraniteForCausalLM", {"rope_scaling": {"rope_type": "spiral"}}, "'spiral'"),
    ],
)
def test_settings_that_a_family_does_not_support_are_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_config_folder(tmp_path, architectures=[architecture], **changes)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(folder, device="reference", load_format="dummy")


def test_a_window_that_is_switched_off_is_not_used(tmp_path: Path) -> None:
    off = {"sliding_window": 8, "use_sliding_window": False}
    folder = make_config_folder(tmp_path, architectures=["Qwen2ForCausalLM"], **off)

    engine = engine_of(folder, device="reference", load_format="dummy")

    assert {spec.sliding_window for spec in engine.attention_specs} == {None}


def test_a_bias_that_the_config_does_not_mention_is_named(tmp_path: Path) -> None:
    CASES["qwen2"].make().save_pretrained(tmp_path)
    llama = {"architectures": ["LlamaForCausalLM"]}

    with pytest.raises(CheckpointError, match=r"does not use: .*self_attn.[qkv]_proj.bias'"):
        engine_of(tmp_path, device="reference", hf_overrides=llama)
