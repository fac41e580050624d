"""Sampling parameters in request bodies: each is declared in SamplingParams alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pydantic
import pytest

from portalm.sampling_params import SamplingParams
from portalm.server.schemas.chat import ChatRequest
from portalm.server.schemas.completions import CompletionRequest
from portalm.server.schemas.conversation import ConversationFields
from portalm.server.schemas.responses import ResponsesRequest
from portalm.server.schemas.sampling import SamplingFields

OTHER_FIELDS = {
    # of the request, not of sampling
    "model", "stream", "stream_options", "request_id", "priority", "cache_salt",
    "user", "metadata", "store", "service_tier",
    # other names of structured_outputs
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_whitespace_pattern",
    # of BeamSearchParams
    "use_beam_search", "length_penalty", "early_stopping",
}  # fmt: skip
"""Fields of every generating endpoint that are not in SamplingParams."""

CHAT_FIELDS = {
    "messages", "tools", "tool_choice", "parallel_tool_calls",
    *ConversationFields.model_fields,
    "max_completion_tokens", "top_logprobs", "return_token_ids", "truncate_prompt_tokens",
}  # fmt: skip
COMPLETION_FIELDS = {
    "prompt", "echo", "best_of", "suffix", "return_token_ids", "truncate_prompt_tokens",
}  # fmt: skip
RESPONSES_SAMPLING_FIELDS = {"temperature", "top_p", "top_k", "min_p", "seed"}

VALUES: dict[str, Any] = {
    "n": 2,
    "stop": ["x"],
    "stop_token_ids": [3],
    "max_tokens": 7,
    "logprobs": 1,
    "prompt_logprobs": 1,
    "seed": 5,
    "logit_bias": {"4": 1.5},
    "allowed_token_ids": [4, 5],
    "bad_words": ["y"],
    "structured_outputs": {"regex": "a+"},
    "logits_processors": {"no_digits": None},
}
"""A value that is not the default, for fields whose default does not suggest one."""


def other_value(name: str) -> Any:
    default = getattr(SamplingParams(), name)
    if name in VALUES:
        return VALUES[name]
    return not default if isinstance(default, bool) else default + (1 if default == 0 else -0.5)


def names(of: type[Any]) -> set[str]:
    return {field.name for field in fields(of)}


def test_every_sampling_parameter_is_a_field_and_other_fields_are_named_here() -> None:
    assert set(SamplingFields.model_fields) == names(SamplingParams) | OTHER_FIELDS
    assert set(ChatRequest.model_fields) == set(SamplingFields.model_fields) | CHAT_FIELDS
    assert set(CompletionRequest.model_fields) == (
        set(SamplingFields.model_fields) | COMPLETION_FIELDS
    )
    assert names(SamplingParams) & set(ResponsesRequest.model_fields) == RESPONSES_SAMPLING_FIELDS


@pytest.mark.parametrize("name", sorted(names(SamplingParams)))
def test_a_value_of_a_completion_or_chat_becomes_the_parameter(name: str) -> None:
    value = other_value(name)
    expected = getattr(SamplingParams(**{name: value}), name)
    chat = {"logprobs": True, "top_logprobs": value} if name == "logprobs" else {name: value}

    completed = CompletionRequest(prompt="x", **{name: value}).params()
    chatted = ChatRequest(messages=[], **chat).params()

    assert expected != getattr(SamplingParams(), name)
    assert getattr(completed, name) == getattr(chatted, name) == expected


@pytest.mark.parametrize("name", sorted(RESPONSES_SAMPLING_FIELDS))
def test_a_value_of_a_response_becomes_the_parameter(name: str) -> None:
    params = ResponsesRequest(input="x", **{name: other_value(name)}).params()

    assert getattr(params, name) == other_value(name)


def test_defaults_are_those_of_sampling_params_except_the_number_of_tokens() -> None:
    assert CompletionRequest(prompt="x").params() == SamplingParams()
    assert ChatRequest(messages=[]).params() == SamplingParams(max_tokens=None)
    assert ResponsesRequest(input="x").params() == SamplingParams(max_tokens=None)


@pytest.mark.parametrize("name", ["temperature", "top_p", "stop", "logit_bias", "seed"])
def test_null_is_the_default(name: str) -> None:
    assert CompletionRequest(prompt="x", **{name: None}).params() == SamplingParams()


@pytest.mark.parametrize(("name", "value"), [("n", "two"), ("ignore_eos", 3), ("min_p", [])])
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        CompletionRequest(prompt="x", **{name: value})

    assert caught.value.errors()[0]["loc"] == (name,)
