"""Sampling parameters are normalized, and invalid ones refused."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams, as_token_ids


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("n", 0, "at least 1"),
        ("n", 1.0, "must be an integer"),
        ("n", True, "must be an integer"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "must be finite"),
        ("temperature", math.inf, "must be finite"),
        ("temperature", "1", "must be a number"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("top_k", -2, "at least 0"),
        ("top_k", 2**40, "at most"),
        ("min_p", 2, "at most 1"),
        ("presence_penalty", 2.5, "at most 2"),
        ("frequency_penalty", -3, "at least -2"),
        ("repetition_penalty", 0, "above 0"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -1, "at least 1"),
        ("max_tokens", 2**80, "at most"),
        ("min_tokens", 17, r"\(17\) is above max_tokens \(16\)"),
        ("logprobs", 21, "at most 20"),
        ("prompt_logprobs", -1, "at least 0"),
        ("seed", 2**63, "at most"),
        ("stop", [""], "non-empty"),
        ("stop", [3], "non-empty strings"),
        ("stop", 2.5, "must be a list"),
        ("stop_token_ids", [-1], "at least 0"),
        ("stop_token_ids", ["a"], "must be an integer"),
        ("bad_words", [""], "non-empty"),
        ("allowed_token_ids", [], "no token could be sampled"),
        ("allowed_token_ids", [1.5], "must be an integer"),
        ("logit_bias", {"a": 1}, "map token ids to numbers"),
        ("logit_bias", [1], "map token ids to numbers"),
        ("logit_bias", {1: 101}, "at most 100"),
        ("logit_bias", {1: math.nan}, "must be finite"),
        ("logit_bias", {-1: 1}, "at least 0"),
        ("ignore_eos", "no", "true or false"),
        ("detokenize", None, "true or false"),
    ],
)
def test_an_invalid_value_is_refused_by_name(name, value, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        SamplingParams(**{name: value})

    assert caught.value.param == name
    assert str(caught.value).startswith(name)


def test_stop_strings_need_detokenization():
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_single_item_is_accepted_for_a_list():
    params = SamplingParams(stop="ab", bad_words="cd", stop_token_ids=7)

    assert (params.stop, params.bad_words, params.stop_token_ids) == (("ab",), ("cd",), (7,))


def test_none_is_accepted_for_an_empty_list():
    params = SamplingParams(stop=None, bad_words=None, stop_token_ids=None, logit_bias=None)

    assert params == SamplingParams()


def test_top_k_of_minus_one_keeps_all_tokens():
    assert SamplingParams(top_k=-1).top_k == 0


def test_logit_bias_accepts_string_keys_from_json():
    assert SamplingParams(logit_bias={"5": -100}).logit_bias == {5: -100.0}


def test_an_unknown_name_is_refused_and_known_ones_listed():
    with pytest.raises(InvalidRequest, match=r"temprature is not .* temperature") as caught:
        SamplingParams.from_dict({"temprature": 1})

    assert caught.value.param == "temprature"


def test_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = -1


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"bad_words": ["x"]}, True),
        ({"logit_bias": {1: 1.0}}, False),
    ],
)
def test_history_is_needed_if_earlier_tokens_change_the_logits(changes, needs):
    assert SamplingParams(**changes).needs_history is needs


def test_params_survive_encoding():
    params = SamplingParams(
        n=2, stop=["a"], logit_bias={3: 1.5}, allowed_token_ids=[1, 2], bad_words=["b"], seed=-5
    )

    wire = msgspec.msgpack.encode(params)

    assert msgspec.msgpack.decode(wire, type=SamplingParams) == params


@pytest.mark.parametrize("values", [[1, "a"], [1, 2.0], [True], "ab"])
def test_token_ids_are_integers(values):
    with pytest.raises(InvalidRequest, match="must be integers"):
        as_token_ids(values)


def test_token_ids_are_copied():
    ids = (1, 2)

    assert as_token_ids(ids) == [1, 2]
