"""/v1/completions in detail: logprobs and offsets, echo, scoring, best_of, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import BYTE_0, EOS, RunningServer

PROMPT = "the well"
E_ACUTE = [BYTE_0 + 0xC3, BYTE_0 + 0xA9]
SETTINGS = {"prompt": PROMPT, "temperature": 1, "seed": 3, "ignore_eos": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def http(byte_server: RunningServer) -> Iterator[httpx.Client]:
    with byte_server.client() as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json={**SETTINGS, **body})


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = ask(http, **body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = ask(http, **body, stream=True)
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def choices(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]


def joined(chunks: list[dict[str, Any]], name: str, index: int = 0) -> list[Any]:
    """Concatenate one of the parallel lists of logprobs over the whole stream."""
    found = [one["logprobs"] for one in choices(chunks, index) if one["logprobs"] is not None]
    return [value for one in found for value in one[name]]


# -- prompts ----------------------------------------------------------------------------------


def test_prompts_can_be_texts_or_ids_one_or_several(http) -> None:
    tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]

    asked = [PROMPT, [PROMPT], tokens, [tokens], [PROMPT, PROMPT], [tokens, tokens]]
    answers = [complete(http, prompt=one)["choices"] for one in asked]

    assert [len(one) for one in answers] == [1, 1, 1, 1, 2, 2]
    assert len({choice["text"] for one in answers for choice in one}) == 1


@pytest.mark.parametrize(
    ("limit", "left"), [(3, 3), (400, 20), (-1, 20)], ids=["cut", "short", "room"]
)
def test_a_prompt_is_truncated_to_its_last_tokens(http, limit: int, left: int) -> None:
    prompt = "0123456789" * 2

    [choice] = complete(
        http, prompt=prompt, truncate_prompt_tokens=limit, return_token_ids=True
    )["choices"]  # fmt: skip

    assert choice["prompt_token_ids"] == [BYTE_0 + ord(c) for c in prompt[-left:]]


def test_long_prompt_is_truncated_to_leave_room_for_the_answer(http) -> None:
    body = complete(http, prompt="x" * 600, truncate_prompt_tokens=-1)

    assert body["usage"]["prompt_tokens"] == 512 - 12
    assert body["usage"]["completion_tokens"] == 12


def test_token_strings_are_those_of_the_vocabulary(http) -> None:
    body = {"prompt": "x the", "return_token_strs": True}

    assert http.post("/tokenize", json=body).json()["token_strs"] == ["x", "\u0120the"]


def test_tokenizer_info_has_special_tokens_and_chat_template(http) -> None:
    info = http.get("/tokenizer_info").json()

    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert info["chat_template"] == "{% for m in messages %}{{ m.content }}{% endfor %}"


# -- logprobs ---------------------------------------------------------------------------------


def test_logprobs_are_parallel_lists_and_top_logprobs_include_the_sampled_token(http) -> None:
    [choice] = complete(http, logprobs=2)["choices"]
    logprobs = choice["logprobs"]

    assert {len(values) for values in logprobs.values()} == {12}
    for token, own, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == own
        assert 2 <= len(top) <= 3


def test_text_offsets_are_the_starts_of_tokens(http) -> None:
    ids = [BYTE_0 + ord("a"), *E_ACUTE, BYTE_0 + ord("z")]
    [choice] = complete(http, allowed_token_ids=ids, max_tokens=60, logprobs=0)["choices"]
    text, logprobs = choice["text"], choice["logprobs"]

    assert "\u00e9" in text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset] == token
        elif token == "bytes:\\xa9":  # the second half of a character, or invalid on its own
            assert text[offset] in "\u00e9\ufffd"


def test_streamed_logprobs_equal_whole_logprobs(http) -> None:
    """This includes text that is held back for a stop string."""
    ids = [BYTE_0 + ord(c) for c in "abc"]
    asked = {"allowed_token_ids": ids, "max_tokens": 60, "logprobs": 1, "stop": "acbb", "n": 2}

    whole = complete(http, **asked)["choices"]
    chunks = stream(http, **asked)

    for index in (0, 1):
        assert "".join(one["text"] for one in choices(chunks, index)) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert joined(chunks, name, index) == values, name


def test_prompt_logprobs_are_objects_keyed_by_token_id(http) -> None:
    [choice] = complete(http, prompt_logprobs=1, return_token_ids=True)["choices"]

    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token_id, entry in zip(choice["prompt_token_ids"][1:], others, strict=True):
        assert set(entry[str(token_id)]) == {"logprob", "rank", "decoded_token"}
        assert 1 <= len(entry) <= 2


# -- echo and scoring ------------------------------------------------------------------------


def test_echo_with_logprobs_includes_the_prompts_tokens(http) -> None:
    plain = complete(http, logprobs=1)["choices"][0]

    [choice] = complete(http, logprobs=1, echo=True)["choices"]
    logprobs = choice["logprobs"]

    assert choice["text"] == PROMPT + plain["text"]
    assert logprobs["tokens"][:4] == ["the", " ", "w", "e"]
    assert logprobs["text_offset"][:5] == [0, 3, 4, 5, 6]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["tokens"][5:] == plain["logprobs"]["tokens"]
    shift = [len(PROMPT) + offset for offset in plain["logprobs"]["text_offset"]]
    assert logprobs["text_offset"][5:] == shift


def test_max_tokens_0_with_echo_scores_the_prompt_alone(http) -> None:
    with_answer = complete(http, echo=True, logprobs=1)["choices"][0]["logprobs"]

    body = complete(http, echo=True, logprobs=1, max_tokens=0)

    [choice] = body["choices"]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    for name, values in choice["logprobs"].items():
        assert values == with_answer[name][:5]


def test_lm_eval_requests_score_token_ids(http) -> None:
    """Its local-completions reads token_logprobs[context:-1] and compares them with the top."""
    first, second = [BYTE_0 + ord(c) for c in "abcd"], [BYTE_0 + ord(c) for c in "wxyz!"]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}

    both = complete(http, prompt=[first, second], **asked)["choices"]
    alone = complete(http, prompt=[second], **asked)["choices"][0]

    assert [len(one["logprobs"]["token_logprobs"]) for one in both] == [5, 6]
    for one in both:
        for own, top in zip(
            one["logprobs"]["token_logprobs"][1:], one["logprobs"]["top_logprobs"][1:], strict=True
        ):
            assert own <= max(top.values())
    expected = alone["logprobs"]["token_logprobs"][1:-1]
    assert both[1]["logprobs"]["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)


def test_scored_token_has_the_logprob_it_was_sampled_with(http) -> None:
    sampled = complete(http, logprobs=0, return_token_ids=True)["choices"][0]
    known = [*sampled["prompt_token_ids"], *sampled["token_ids"]]

    [scored] = complete(http, prompt=known, echo=True, logprobs=0, max_tokens=0)["choices"]

    expected = sampled["logprobs"]["token_logprobs"]
    assert scored["logprobs"]["token_logprobs"][5:] == pytest.approx(expected, abs=1e-3)


def test_echo_is_streamed_first(http) -> None:
    asked = {"echo": True, "logprobs": 1, "n": 2, "prompt_logprobs": 1}
    whole = complete(http, **asked)["choices"]

    chunks = stream(http, **asked)

    for index in (0, 1):
        mine = choices(chunks, index)
        assert mine[0]["text"] == PROMPT
        assert mine[0]["prompt_logprobs"] == whole[index]["prompt_logprobs"]
        assert "".join(one["text"] for one in mine) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert joined(chunks, name, index) == values, name


def test_scoring_a_prompt_can_be_streamed(http) -> None:
    chunks = stream(http, echo=True, logprobs=1, max_tokens=0)

    assert "".join(one["text"] for one in choices(chunks)) == PROMPT
    assert [one["finish_reason"] for one in choices(chunks)] == [None, "length"]
    assert len(joined(chunks, "tokens")) == 5


# -- best_of ----------------------------------------------------------------------------------


def test_best_of_returns_the_most_likely_answers(http) -> None:
    all_four = complete(http, n=4, logprobs=0)["choices"]
    ranked = sorted(all_four, key=lambda one: -sum(one["logprobs"]["token_logprobs"]))

    body = complete(http, n=2, best_of=4)

    assert [one["text"] for one in body["choices"]] == [one["text"] for one in ranked[:2]]
    assert [one["index"] for one in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 4 * 12


@pytest.mark.parametrize(
    "body", [{"n": 2, "best_of": 1}, {"best_of": 2, "stream": True}, {"best_of": 5000}], ids=str
)
def test_invalid_best_of_is_rejected(http, body: dict[str, Any]) -> None:
    response = ask(http, **body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("best_of", "n")


# -- streams ----------------------------------------------------------------------------------


def test_no_chunk_ends_inside_a_character(http) -> None:
    asked = {"allowed_token_ids": E_ACUTE, "max_tokens": 200, "return_token_ids": True}
    chunks = stream(http, **asked)

    mine = choices(chunks)
    token_ids = [token_id for one in mine for token_id in one["token_ids"]]
    text = "".join(one["text"] for one in mine)
    assert len(token_ids) == 200
    assert text == bytes(token_id - BYTE_0 for token_id in token_ids).decode("utf-8", "replace")
    assert text.count("\u00e9") > 20
    assert text == complete(http, **asked)["choices"][0]["text"]


def test_possible_start_of_a_stop_string_is_not_streamed(http) -> None:
    ids = [BYTE_0 + ord(c) for c in "ab"]
    plain = complete(http, allowed_token_ids=ids, max_tokens=200)["choices"][0]["text"]
    stop = plain[100:112]  # many partial matches come before it

    seen = ""
    for one in choices(stream(http, allowed_token_ids=ids, max_tokens=200, stop=[stop])):
        seen += one["text"]
        assert plain[: plain.index(stop)].startswith(seen)
    assert seen == plain[: plain.index(stop)]


def test_streamed_answers_of_several_prompts_have_their_index_and_end_once(http) -> None:
    asked = {"prompt": ["he", "tell", PROMPT], "n": 2, "logit_bias": {str(EOS): 1}}
    whole = complete(http, **asked)["choices"]

    chunks = stream(http, **asked, stream_options={"include_usage": True})

    for index in range(6):
        mine = choices(chunks, index)
        assert "".join(one["text"] for one in mine) == whole[index]["text"]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole[index]["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 72
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_continuous_usage_stats_grow_with_every_chunk(http) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    chunks = stream(http, echo=True, stream_options=options)

    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[-1] == 12 and len(set(counts)) > 6
    assert counts == sorted(counts)
