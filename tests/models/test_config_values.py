"""Values of config.json that cannot be used are named; those of a model card are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from portalm.errors import CheckpointError, ConfigError, PortaLMError, UnsupportedModel
from portalm.models.decoder import Decoder
from portalm.models.loader.config_json import read_config
from portalm.models.registry import ARCHITECTURES, model_class
from tests.models.test_families import engine_of
from tests.tiny import ask, make_config_folder, run, tokens

LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_null_where_a_number_is_needed_is_named(tmp_path: Path, architecture: str) -> None:
    values = {**LATENT, "num_experts_per_tok": None}
    folder = make_config_folder(tmp_path, architectures=[architecture], **values)

    with pytest.raises(UnsupportedModel, match=r"num_experts_per_tok must be a number .* not None"):
        engine_of(folder, device="cpu", load_format="dummy")


@pytest.mark.parametrize("value", [None, "many", [4], 0.5, True])
@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
             "max_position_embeddings", "vocab_size"]
)  # fmt: skip
def test_a_size_that_is_no_whole_number_is_named(tmp_path: Path, name: str, value: object) -> None:
    folder = make_config_folder(tmp_path, **{name: value})

    with pytest.raises(CheckpointError, match=f"{name} must be a whole number"):
        engine_of(folder, device="cpu", load_format="dummy")


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if issubclass(model_class(name), Decoder)]
)
def test_no_value_of_a_family_ends_in_a_bare_error(tmp_path: Path, architecture: str) -> None:
    """Each of a family's own keys, null or of another type: it loads, or is refused by name."""
    family = model_class(architecture)
    assert issubclass(family, Decoder)
    keys = [name for name, value in family.defaults.items() if not isinstance(value, dict)]
    for i, name in enumerate(keys):
        for value in (None, "x"):
            folder = make_config_folder(
                tmp_path / f"{i}{value}", architectures=[architecture], **{name: value}
            )
            try:
                family(read_config(folder, {}), "float32").shapes()
            except PortaLMError:
                continue
            except Exception as error:
                raise AssertionError(f"{name} {value!r}") from error


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("original", [True, False])
def test_yarn_extends_the_longest_text_as_model_cards_say(tmp_path: Path, original: bool) -> None:
    """As transformers computes it beyond max_position_embeddings, which a card leaves unchanged."""
    torch.manual_seed(0)
    yarn = dict(YARN) if original else {k: v for k, v in YARN.items() if "original" not in k}
    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        rope_parameters={**yarn, "rope_theta": 10_000.0},
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, device="cpu")
    prompt = [(7 * i + i * i) % 120 for i in range(200)]

    ask(engine, "a", prompt, max_tokens=40)
    [sampled] = tokens(run(engine)).values()

    assert engine.max_model_len == 256
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + sampled])).logits[0]
    assert sampled == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    with pytest.raises(
        ConfigError, match=r"max_model_len \(257\) is above the model's limit of 256"
    ):
        engine_of(tmp_path, device="cpu", max_model_len=257)


def test_yarn_of_a_familys_defaults_does_not_extend_the_longest_text(tmp_path: Path) -> None:
    values = {"architectures": ["GptOssForCausalLM"], "max_position_embeddings": 256}
    own = {"rope_scaling": {**YARN, "original_max_position_embeddings": 128}}

    default = read_config(make_config_folder(tmp_path / "default", **values), {})
    stated = read_config(make_config_folder(tmp_path / "stated", **values, **own), {})

    assert dict(default.rope.scaling)["rope_type"] == "yarn"
    assert (default.max_position, stated.max_position) == (256, 512)
