"""Engines of a tiny random-weight model on the backend under test."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from portalm.config import EngineConfig
from portalm.conformance.subject import Subject
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.sampling_params import SamplingParams

VOCAB_SIZE = 160

_CONFIG = {
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
}


@contextlib.contextmanager
def tiny_engine(subject: Subject, variant: str = "llama", **settings: Any) -> Iterator[Engine]:
    """An engine; its model's folder lives as long as the block."""
    head_size = subject.head_size
    config = {**_CONFIG, "head_dim": head_size, "torch_dtype": subject.dtype, **VARIANTS[variant]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = Engine(
            EngineConfig.from_dict(
                {
                    "model": folder,
                    "load_format": "dummy",
                    "block_size": subject.block_size,
                    "max_num_seqs": 8,
                    "max_num_batched_tokens": 64,
                    "num_gpu_blocks_override": 8 * 256 // subject.block_size,
                    "kv_cache_dtype": subject.kv_dtype(subject.dtype),
                    **settings,
                }
            ),
            backend=subject.backend,
        )
        yield engine
        engine.close()


def ask(engine: Engine, request_id: str, prompt: Sequence[int], **params: Any) -> None:
    """Add a request; greedy, 12 tokens and no end of sequence unless told otherwise."""
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


def finish(engine: Engine) -> dict[str, list[TokenOutput]]:
    """All outputs, by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    """Generated tokens, by request."""
    return {k: [t for o in many for t in o.token_ids] for k, many in outputs.items()}


def prompts(count: int = 6) -> dict[str, list[int]]:
    """Prompts of many lengths."""
    return {
        str(i): [(i * 31 + j * j + 3) % VOCAB_SIZE for j in range(1 + 17 * i)] for i in range(count)
    }
