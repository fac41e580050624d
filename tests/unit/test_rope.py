"""Rope tables compared with those of transformers, for every scaling and several lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portalm.errors import UnsupportedModel
from portalm.layers.rope import cos_sin_table
from portalm.models.loader.config_json import model_config

LENGTH = 64
"""Context length that the models were trained on."""

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "original_max_position_embeddings": LENGTH,
    },
    "yarn, not truncated, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": LENGTH,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": LENGTH,
    },
}


def config_values(scaling: dict[str, Any]) -> dict[str, Any]:
    is_dynamic = scaling["rope_type"] == "dynamic"  # it has only one length
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH if is_dynamic else 4 * LENGTH,
        "rope_parameters": {"rope_theta": 5000.0, **scaling},
    }


@pytest.mark.parametrize("length", [LENGTH // 2, LENGTH, 3 * LENGTH])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_table_equals_that_of_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = config_values(SCALINGS[name])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**values))
    cos, sin = theirs(torch.empty(1), torch.arange(length)[None])
    config = model_config(values, {})

    table = cos_sin_table(
        config.serving(length).rope, head_size=16, max_position=config.max_position
    )

    half = cos.shape[-1] // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    torch.testing.assert_close(table[:length], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "rope scaling 'spiral' is not supported; supported: dynamic"),
        ({"rope_type": "linear", "factor": 2.0, "bend": 3}, "linear: bend is 3"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "1 factors, but the model has 8 frequencies",
        ),
    ],
    ids=["kind", "parameter", "factors"],
)
def test_an_unknown_scaling_is_refused_by_name(scaling: dict[str, Any], message: str) -> None:
    config = model_config(config_values(scaling), {})

    with pytest.raises(UnsupportedModel, match=message):
        cos_sin_table(config.rope, head_size=16, max_position=8)


@pytest.mark.parametrize(("length", "num_said"), [(LENGTH, 0), (LENGTH + 1, 1)])
def test_a_warning_says_that_short_texts_use_the_long_factors(
    length: int, num_said: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = model_config(config_values(SCALINGS["longrope"]), {}).serving(length)

    cos_sin_table(config.rope, head_size=16, max_position=config.max_position)

    assert len([r for r in caplog.records if "--max-model-len 64" in r.message]) == num_said
