"""Engines with a tiny random-weight model on the backend under test."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from portalm.config import EngineConfig
from portalm.conformance.base import NotClaimed
from portalm.conformance.subject import Subject
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.errors import Unsupported
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams

VOCAB_SIZE = 160

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied head": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5},
    "gemma": {"architectures": ["GemmaForCausalLM"]},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 24},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
    },
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "head_dim": None},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "head_dim": None},
    "falcon": {"architectures": ["FalconForCausalLM"], "head_dim": None},
    "falcon, alibi": {
        "architectures": ["FalconForCausalLM"],
        "head_dim": None,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
    },
    "glm": {"architectures": ["GlmForCausalLM"]},
    "glm4": {"architectures": ["Glm4ForCausalLM"]},
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"], "sliding_window": None},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"],
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "arcee": {"architectures": ["ArceeForCausalLM"]},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 2},
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.1,
        "embedding_multiplier": 2.5,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
    },
    "hunyuan": {"architectures": ["HunYuanDenseV1ForCausalLM"]},
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "apertus": {"architectures": ["ApertusForCausalLM"]},
    "phi": {"architectures": ["PhiForCausalLM"], "head_dim": None},
    "phimoe": {
        "architectures": ["PhimoeForCausalLM"],
        "attention_bias": True,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "router_jitter_noise": 0.2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 64,
        "num_local_experts": 4,
    },
    "qwen2 moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "moe_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3 moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": 48,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "sliding_window": 24,
    },
    "deepseek v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "q_lora_rank": None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
    },
    "deepseek v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "original_max_position_embeddings": 64,
        },
        "topk_group": 2,
        "v_head_dim": 20,
    },
    "cohere": {"architectures": ["CohereForCausalLM"], "logit_scale": 1.5},
    "cohere2": {
        "architectures": ["Cohere2ForCausalLM"],
        "logit_scale": 1.5,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
}
"""Decoders by name: values of config.json that differ from `_CONFIG`. head_dim None: derived from
the hidden size."""


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"architectures": ["BertModel"], "model_type": "bert"},
    "roberta": {"architectures": ["RobertaModel"], "model_type": "roberta", "pad_token_id": 1},
    "modernbert": {
        "architectures": ["ModernBertModel"],
        "local_attention": 16,
        "model_type": "modernbert",
    },
}
"""Encoders by name, in the same form."""


@contextlib.contextmanager
def tiny_engine(subject: Subject, variant: str = "llama", **settings: Any) -> Iterator[Engine]:
    """Start an engine with one of the models; its folder exists as long as the context.

    Raises:
        NotClaimed: the backend does not claim something that the model needs.
    """
    head_size = subject.head_size
    own = VARIANTS.get(variant) or ENCODERS.get(variant, {})
    config = {**_CONFIG, "head_dim": head_size, "torch_dtype": subject.dtype, **own}
    if variant in ENCODERS:
        config["head_dim"] = None
    if config["head_dim"] is None:
        config["hidden_size"] = _CONFIG["num_attention_heads"] * head_size
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        values = {
            "model": folder,
            "load_format": "dummy",
            "block_size": subject.block_size,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "num_gpu_blocks_override": 8 * 256 // subject.block_size,
            "kv_cache_dtype": subject.kv_dtype(subject.dtype),
            **settings,
        }
        try:
            engine = Engine(EngineConfig.from_dict(values), backend=subject.backend)
        except Unsupported as reason:
            raise NotClaimed(str(reason)) from None
        yield engine
        engine.close()


def ask(engine: Engine, request_id: str, prompt: Sequence[int], **params: Any) -> None:
    """Add a request: by default greedy, 12 tokens, ignoring the end of sequence."""
    engine.add(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(
                **{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
            ),
            seed=int(params.get("seed") or 0),
        )
    )


def pool(engine: Engine, request_id: str, prompt: Sequence[int]) -> None:
    """Add a request for the mean of its hidden states, not normalized."""
    engine.add(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(),
            seed=0,
            pooling=PoolingParams(pooling="mean", normalize=False),
        )
    )


def finish(engine: Engine) -> dict[str, list[TokenOutput]]:
    """Run the engine until it is idle; return all outputs by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    """Return the generated tokens by request."""
    return {k: [t for o in many for t in o.token_ids] for k, many in outputs.items()}


def prompts(count: int = 6) -> dict[str, list[int]]:
    """Return prompts of different lengths by request id."""
    return {
        str(i): [(i * 31 + j * j + 3) % VOCAB_SIZE for j in range(1 + 17 * i)] for i in range(count)
    }
