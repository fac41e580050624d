"""Llama: tiny random checkpoints saved by transformers, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.decoder import Decoder
from portalm.models.loader import open_checkpoint
from tests.tiny import ask, run

PROMPTS = {str(n): [(7 * n + i * i) % 250 for i in range(n)] for n in (1, 2, 17, 33, 90)}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 64},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def make_model(variant: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **VARIANTS[variant],
        }
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # wide enough that no two logits are equal
        parameter.data.normal_(0, 0.2)
    return model


def engine_of(folder: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig.from_dict(
            {"model": str(folder), "max_num_seqs": 8, "max_num_batched_tokens": 48, **settings}
        )
    )


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_and_greedy_tokens_equal_transformers(
    tmp_path: Path, variant: str, device: str
) -> None:
    model = make_model(variant)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    engine = engine_of(tmp_path, device=device)
    for name, prompt in PROMPTS.items():
        ask(engine, name, prompt, max_tokens=64, prompt_logprobs=0)

    outputs = run(engine)

    for name, prompt in PROMPTS.items():
        sampled = [t for o in outputs[name] for t in o.token_ids]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled])).logits[0].double()
        expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]
        actual = torch.tensor([e.logprob for o in outputs[name] for e in o.prompt_logprobs or []])
        if len(prompt) > 1:
            error = (actual - expected).square().sum() / expected.square().sum()
            assert error < 1e-10, (name, float(error))
        assert sampled == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def saved(tmp_path: Path) -> Path:
    make_model("grouped queries").save_pretrained(tmp_path)
    return tmp_path


def config_text(folder: Path, old: str, new: str) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace(old, new))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=r"model.safetensors.*truncated"):
        engine_of(tmp_path, device="reference")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_model("grouped queries").save_pretrained(tmp_path, max_shard_size="60KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()

    with pytest.raises(CheckpointError, match=f"{missing.name}.*the index lists this file"):
        engine_of(tmp_path, device="reference")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = saved(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        engine_of(tmp_path, device="reference")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    config_text(saved(tmp_path), '"intermediate_size": 112', '"intermediate_size": 96')

    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight' has shape \[112, 64\].*\[96, 64\]"
    ):
        engine_of(tmp_path, device="reference")


def test_an_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    config_text(saved(tmp_path), "LlamaForCausalLM", "VaxForCausalLM")

    with pytest.raises(UnsupportedModel, match=r"'VaxForCausalLM'.*LlamaForCausalLM"):
        engine_of(tmp_path, device="reference")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_broken_config_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (saved(tmp_path) / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"config\.json"):
        engine_of(tmp_path, device="reference")


def test_hf_overrides_replace_values_of_the_config(tmp_path: Path) -> None:
    config = EngineConfig.from_dict(
        {"model": str(saved(tmp_path)), "hf_overrides": {"rope_theta": 5e5, "eos_token_id": [3, 4]}}
    )

    shape = open_checkpoint(tmp_path, config).config

    assert shape.eos_token_ids[:2] == (3, 4)


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    (saved(tmp_path) / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')

    shape = open_checkpoint(tmp_path, EngineConfig(model=str(tmp_path))).config

    assert set(shape.eos_token_ids) >= {7, 9}


def test_dummy_weights_are_the_same_every_time(tmp_path: Path) -> None:
    config = EngineConfig.from_dict({"model": str(saved(tmp_path)), "load_format": "dummy"})
    one, other = (open_checkpoint(tmp_path, config) for _ in range(2))

    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name))


def test_startup_does_not_build_the_model_for_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)

    def shapes(self: object) -> None:
        raise AssertionError("shapes() takes longer than loading a small model")

    monkeypatch.setattr(Decoder, "shapes", shapes)

    engine_of(folder)
