"""The small config keeps every kind of layer, with lengths that the check's prompt exceeds."""

from __future__ import annotations

from typing import Any

from portalm.models.small_config import PROMPT_LENGTH, VOCAB_SIZE, shrink

LARGE: dict[str, Any] = {
    "vocab_size": 100_000,
    "eos_token_id": [99_999, 5],
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 4096,
    "attention_chunk_size": 8192,
    "layer_types": [*["chunked_attention"] * 3, "full_attention"] * 12,
    "mlp_layer_types": [*["dense"] * 47, "sparse"],
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131_072,
    "attention_bias": True,
    "hidden_act": "silu",
}


def test_one_layer_of_each_kind_is_kept() -> None:
    small = shrink(LARGE)

    assert small["num_hidden_layers"] == 5
    assert small["layer_types"] == [*["chunked_attention"] * 3, *["full_attention"] * 2]
    assert small["mlp_layer_types"] == [*["dense"] * 4, "sparse"]


def test_layers_that_a_period_counts_are_kept() -> None:
    assert shrink({**LARGE, "first_k_dense_replace": 7})["num_hidden_layers"] == 9


def test_lengths_are_shorter_than_the_prompt() -> None:
    small = shrink(LARGE)

    assert small["sliding_window"] < PROMPT_LENGTH
    assert small["attention_chunk_size"] < PROMPT_LENGTH
    assert small["rope_parameters"]["original_max_position_embeddings"] < PROMPT_LENGTH


def test_query_heads_still_share_keys() -> None:
    small = [shrink({**LARGE, "num_key_value_heads": n}) for n in (1, 8, 32)]

    assert [values["num_key_value_heads"] for values in small] == [1, 2, 4]


def test_values_that_select_code_stay() -> None:
    small = shrink(LARGE)

    assert small["max_position_embeddings"] == 4096  # longer than any prompt of a comparison
    assert (small["attention_bias"], small["hidden_act"]) == (True, "silu")
    assert small["rope_parameters"]["factor"] == 4.0
    assert all(token < VOCAB_SIZE for token in small["eos_token_id"])
