"""The text part of models that also read images gives the answers of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.loader.config_json import read_config
from portalm.models.small_config import randomize
from portalm.models.text_part import MULTIMODAL
from tests.models.test_families import PROMPTS, TINY, engine_of
from tests.tiny import ask, run, tokens

VISION = {
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "intermediate_size": 48,
               "num_heads": 2, "out_hidden_size": 64}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({"head_dim": 32, "sliding_window": 24}, VISION),
    "Mistral3": ({"model_type": "mistral", "head_dim": 24, "sliding_window": None}, VISION),
    "Llava": ({"model_type": "llama"}, VISION),
    "Qwen2VL": ({"rope_scaling": MROPE}, QWEN_VISION),
    "Qwen2_5_VL": ({"rope_scaling": MROPE}, QWEN_VISION),
    "Qwen3VL": (
        {"head_dim": 16, "rope_scaling": {**MROPE, "mrope_interleaved": True}},
        {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}
"""Prefix of transformers' classes -> changes of the text config, and the vision config."""


def make(name: str) -> Any:
    """A small model with random weights."""
    import transformers

    text, vision = CASES[name]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TINY, **text}, vision_config=vision
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_transformers(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)

    engine = engine_of(tmp_path, device="reference", max_model_len=200)
    for key, prompt in PROMPTS.items():
        ask(engine, key, prompt, max_tokens=16)
    sampled = tokens(run(engine))

    for key, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + sampled[key]])).logits[0]
        assert sampled[key] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), key
    [line] = [r.message for r in caplog.records if "images are not read" in r.message]
    assert f"the text part of {name}ForConditionalGeneration" in line


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_tensors_are_found_under_the_names_of_published_checkpoints(
    tmp_path: Path, prefix: str
) -> None:
    from safetensors.torch import load_file, save_file

    make("Mistral3").save_pretrained(tmp_path)
    before = answers(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    [old] = {n.split("layers.")[0] for n in tensors if "layers.0.mlp.gate" in n}
    head = "language_model.lm_head" if prefix.startswith("language") else "lm_head"
    renamed = {}
    for name, tensor in tensors.items():
        name = prefix + name.removeprefix(old) if name.startswith(old) else name
        renamed[f"{head}.weight" if name.endswith("lm_head.weight") else name] = tensor
    save_file(renamed, file)

    assert answers(tmp_path) == before


def answers(folder: Path) -> list[int]:
    engine = engine_of(folder, device="reference", max_model_len=64)
    ask(engine, "a", PROMPTS["17"])
    return tokens(run(engine))["a"]


def test_a_config_that_relies_on_defaults_is_completed(tmp_path: Path) -> None:
    """Values of Gemma 3 4B as published."""
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))

    config = read_config(tmp_path, {})

    assert (config.architecture, config.text_part_of, config.dtype) == (
        "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "bfloat16"
    )  # fmt: skip
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (8, 4, 256)
    assert (config.rope.theta, dict(config.rope.scaling)["factor"]) == (1e6, 8.0)
    assert config.tie_word_embeddings and config.eos_token_ids == (1, 106)


def test_overrides_change_the_text_part(tmp_path: Path) -> None:
    make("Mistral3").save_pretrained(tmp_path)

    flat = read_config(tmp_path, {"max_position_embeddings": 128})
    nested = read_config(tmp_path, {"text_config": {"max_position_embeddings": 64}})

    assert (flat.max_position, nested.max_position) == (128, 64)


def test_a_tensor_of_no_known_part_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("Mistral3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.memory.weight": torch.ones(2)}, file)

    with pytest.raises(CheckpointError, match=r"'model\.memory\.weight'"):
        engine_of(tmp_path, device="reference")


def test_a_text_part_that_cannot_run_is_refused_with_its_reason(tmp_path: Path) -> None:
    values = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {**TINY, "head_dim": 16, "intermediate_size_mlp": 96},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))

    with pytest.raises(UnsupportedModel, match=r"'Llama4ForCausalLM'.* the mask of layer 0"):
        engine_of(tmp_path, device="reference", load_format="dummy")


def test_a_text_part_that_is_no_family_is_refused(tmp_path: Path) -> None:
    values = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"model_type": "opt"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))

    with pytest.raises(UnsupportedModel, match="has model_type 'opt', which is not supported"):
        read_config(tmp_path, {})


def test_every_architecture_with_a_text_part_exists_in_transformers() -> None:
    import transformers

    assert {name for name in MULTIMODAL if not hasattr(transformers, name)} == set()
