"""Keys of config.json belong to a family: those of other families are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portalm.errors import UnsupportedModel
from portalm.models.decoder import Decoder
from portalm.models.registry import ARCHITECTURES, model_class
from tests.models.test_families import CASES, TINY, computed, engine_of
from tests.tiny import make_config_folder

OTHER_VALUES: dict[str, Any] = {
    "head_dim": 40,
    "hidden_act": "relu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["sliding_attention"] * 2,
    "max_position_embeddings": 99,
    "num_attention_heads": 1,
    "num_experts": 3,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 0.5,
    "rope_theta": 5.0,
    "vocab_size": 99,
}
"""A value of each common key that would change the models of test_families.py."""

DECODERS = [c for a in ARCHITECTURES if issubclass(c := model_class(a), Decoder)]  # type: ignore[arg-type]
FOREIGN = {
    name: OTHER_VALUES[common]
    for decoder in DECODERS
    for common, names in decoder.names.items()
    for name in names
    if name != common
}
"""Every key that some family reads in place of a common one, with such a value."""


def all_values(name: str) -> dict[str, Any]:
    """Values of the config.json that transformers writes for a case of test_families.py."""
    case = CASES[name]
    architecture = case.model.format(case.family)
    return {**case.make_config().to_dict(), "architectures": [architecture]}


@pytest.mark.parametrize("name", CASES)
def test_keys_of_other_families_change_nothing(name: str) -> None:
    values = all_values(name)
    own = {n for names in model_class(values["architectures"][0]).names.values() for n in names}  # type: ignore[attr-defined]
    expected = computed(values)

    for key, value in FOREIGN.items():
        if key not in own and key not in values:
            assert computed({**values, key: value}) == expected, key


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "falcon 40b", "starcoder2", "cohere", "gemma2"]
)
def test_a_familys_own_key_counts(name: str) -> None:
    values = all_values(name)
    cls = model_class(values["architectures"][0])
    assert issubclass(cls, Decoder)

    for common, names in cls.names.items():
        key = next((n for n in names if n in values and n != common), None)
        if key is not None and common != "hidden_act":
            assert computed({**values, key: FOREIGN[key]}) != computed(values), key


def test_the_own_key_counts_over_the_common_one() -> None:
    values = all_values("gpt_neox")

    assert computed({**values, "rms_norm_eps": 0.5}) == computed(values)
    assert computed({**values, "layer_norm_eps": 0.5})["eps"] == 0.5


def test_an_older_key_counts_only_where_the_current_one_is_absent() -> None:
    values = {**TINY, "architectures": ["FalconForCausalLM"], "multi_query": False, "n_layer": 1}
    without = {k: v for k, v in values.items() if k != "num_hidden_layers"}

    assert len(computed(values)["attention"]) == 2
    assert len(computed(without)["attention"]) == 1


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("MistralForCausalLM", {"sliding_window": 64, "use_sliding_window": False}, "use_sliding"),
        (
            "Qwen3ForCausalLM",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
            "rope_parameters is",
        ),
        (
            "LlamaForCausalLM",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "both rope_parameters and rope_scaling",
        ),
    ],
)
def test_a_key_that_implementations_read_differently_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_config_folder(tmp_path, architectures=[architecture], **changes)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(folder, device="reference", load_format="dummy")
