"""/v1/chat/completions in detail: logprobs, token ids, the prompt, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import BYTE_0, RunningServer

E_ACUTE = [BYTE_0 + 0xC3, BYTE_0 + 0xA9]
SETTINGS = {
    "messages": [{"role": "user", "content": "the well"}],
    "seed": 3,
    "ignore_eos": True,
    "max_tokens": 8,
}


@pytest.fixture(scope="module")
def http(byte_server: RunningServer) -> Iterator[httpx.Client]:
    with byte_server.client() as client:
        yield client


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json={**SETTINGS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/chat/completions", json={**SETTINGS, **body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("num_top", [0, 2])
def test_number_of_top_logprobs_is_the_requested_one(http, num_top: int) -> None:
    [choice] = chat(http, logprobs=True, top_logprobs=num_top)["choices"]

    shown = [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]]
    assert shown == [num_top] * 8


def test_logprobs_have_the_bytes_of_partial_characters(http) -> None:
    [choice] = chat(http, logprobs=True, allowed_token_ids=E_ACUTE)["choices"]

    found = [one["bytes"] for one in choice["logprobs"]["content"]]
    assert all(one in ([0xC3], [0xA9]) for one in found)
    assert [0xC3] in found and [0xA9] in found


def test_token_ids_are_the_same_whole_or_streamed(http) -> None:
    whole = chat(http, return_token_ids=True)
    chunks = stream(http, return_token_ids=True)

    streamed = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", ())]
    assert len(streamed) == 8
    assert streamed == whole["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]


def test_prompt_logprobs_are_sent_once(http) -> None:
    whole = chat(http, prompt_logprobs=1, n=2)
    first, *others = stream(http, prompt_logprobs=1)

    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert whole["prompt_logprobs"][0] is None
    assert first["prompt_logprobs"] == whole["prompt_logprobs"]
    assert not any("prompt_logprobs" in chunk for chunk in others)


def test_a_conversation_is_truncated_to_its_last_tokens(http) -> None:
    whole = chat(http, return_token_ids=True)["prompt_token_ids"]

    cut = chat(http, return_token_ids=True, truncate_prompt_tokens=3)["prompt_token_ids"]

    assert cut == whole[-3:]


def test_usage_is_null_until_the_last_chunk(http) -> None:
    *chunks, last = stream(http, stream_options={"include_usage": True})

    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["completion_tokens"] == 8
