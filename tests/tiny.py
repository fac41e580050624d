"""Tiny models and engines for tests that do not need a real model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portalm.backend import Backend
from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.sampling_params import SamplingParams

VOCAB_SIZE = 512


def make_config_folder(folder: Path, **changes: Any) -> Path:
    """Write the config.json of a two-layer Llama, for load_format "dummy" (random weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_byte_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer for the tiny model: every byte, and some longer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from portalm.text.spelling import byte_level_alphabet

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for char in byte_level_alphabet():
        vocab[char] = len(vocab)
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ("1", "2"), ("12", "3"), ("a", "b"),
              ("y", "e"), ("ye", "s"), ('"', ":"), ('"', ","), ("{", '"'), ("Ġ", '"')]  # fmt: skip
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    return folder


def make_engine(folder: Path, backend: Backend | None = None, **settings: Any) -> Engine:
    """Create an engine with dummy weights on `backend`, or on the device that `settings` name."""
    return Engine(
        EngineConfig.from_dict(
            {
                "model": str(make_config_folder(folder / "tiny")),
                "load_format": "dummy",
                "max_num_seqs": 8,
                "max_num_batched_tokens": 64,
                **settings,
            }
        ),
        backend=backend,
    )


def ask(
    engine: Engine, request_id: str, prompt: Sequence[int], *, seed: int = 0, **params: Any
) -> None:
    """Add a request; by default greedy, with 8 tokens, ignoring the end of sequence."""
    engine.add(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(
                **{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}
            ),
            seed=seed,
        )
    )


def run(engine: Engine, max_steps: int = 10_000) -> dict[str, list[TokenOutput]]:
    """Run the engine until it has no work; returns all outputs by request id."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return outputs
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    """Generated token ids by request."""
    return {
        request_id: [token for output in many for token in output.token_ids]
        for request_id, many in outputs.items()
    }
