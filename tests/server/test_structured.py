"""Structured outputs over HTTP: every form, invalid ones, and the effect on other requests."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import RunningServer, running_server
from tests.tiny import add_byte_tokenizer, make_config_folder

PHONE = r"\d{3}-\d{4}"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "yes"]}},
    "required": ["ok", "kind"],
}
EXPLOSIVE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
AMBIGUOUS = "(?:.*.*.*){1,50}x"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_config_folder(
        tmp_path_factory.mktemp("structured") / "tiny", max_position_embeddings=4096
    )
    add_byte_tokenizer(folder)
    with running_server(str(folder), "--load-format", "dummy", "--device", "cpu") as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, "seed": 3, **body})


def chat(http: httpx.Client, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "x"}]
    settings = {"messages": messages, "max_tokens": 60, "seed": 3, **body}
    return http.post("/v1/chat/completions", json=settings)


def is_answer(text: str) -> bool:
    answer = json.loads(text)
    return list(answer) == ["ok", "kind"] and isinstance(answer["ok"], bool)


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
            }
        },
        is_answer,
    ),
    "structured_outputs": ({"structured_outputs": {"json": SCHEMA}}, is_answer),
    "structured_outputs regex": (
        {"structured_outputs": {"regex": PHONE}},
        lambda text: re.fullmatch(PHONE, text),
    ),
    "guided_json": ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, is_answer),
    "guided_json as text": ({"guided_json": json.dumps(SCHEMA)}, is_answer),
    "guided_regex": ({"guided_regex": PHONE}, lambda text: re.fullmatch(PHONE, text)),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
    "guided_grammar": ({"guided_grammar": 'root ::= "a" | "b"'}, lambda text: text in "ab"),
    "text": ({"response_format": {"type": "text"}, "max_tokens": 3}, lambda text: True),
}


@pytest.mark.parametrize("form", FORMS)
def test_answer_matches_the_constraint_in_every_form(http: httpx.Client, form: str) -> None:
    body, check = FORMS[form]

    assert check(complete(http, **body).json()["choices"][0]["text"])
    assert check(chat(http, **body).json()["choices"][0]["message"]["content"])


def test_json_object_answer_starts_with_a_brace(http: httpx.Client) -> None:
    response = chat(http, response_format={"type": "json_object"}, max_tokens=30)

    assert response.json()["choices"][0]["message"]["content"].startswith("{")


def test_streamed_answer_matches_the_constraint(http: httpx.Client) -> None:
    response = complete(http, guided_regex=PHONE, stream=True)

    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: {")]
    assert re.fullmatch(PHONE, "".join(json.loads(line)["choices"][0]["text"] for line in lines))


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"guided_regex": "(a"}, "parenthesis"),
    "grammar": ({"guided_grammar": "nothing"}, "root"),
    "ambiguous": ({"guided_regex": AMBIGUOUS}, "too ambiguous"),
    "schema": ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "schema text": ({"guided_json": "{"}, "not JSON"),
    "two": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "exclude"),
    "two guided": ({"guided_regex": "a", "guided_choice": ["a"]}, "exactly one"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "json_schema"),
    "unknown type": ({"response_format": {"type": "xml"}}, "json_schema"),
    "unknown field": ({"structured_outputs": {"lark": "x"}}, "lark"),
    "too long": ({"guided_regex": "a" * 200_000}, "bytes"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_constraint_is_a_400_that_says_why(
    http: httpx.Client, name: str, stream: bool
) -> None:
    body, problem = INVALID[name]

    response = complete(http, stream=stream, **body)

    assert response.status_code == 400
    assert problem in response.json()["error"]["message"]
    assert complete(http, max_tokens=1).status_code == 200


def test_constraint_that_allows_no_token_fails_only_its_request(http: httpx.Client) -> None:
    response = complete(http, guided_regex="a+", allowed_token_ids=[5])

    assert response.status_code == 400
    assert "no token is left" in response.json()["error"]["message"]


def test_explosive_schema_is_a_400_in_time_and_does_not_block_others(server: RunningServer) -> None:
    gaps: list[float] = []
    stop = threading.Event()

    def others() -> None:
        with server.client() as client:
            while not stop.is_set():
                started = time.monotonic()
                body = {"prompt": "y", "max_tokens": 8, "ignore_eos": True, "guided_regex": PHONE}
                assert client.post("/v1/completions", json=body).status_code == 200
                gaps.append(time.monotonic() - started)

    with ThreadPoolExecutor(1) as pool, server.client() as client:
        complete(client, guided_regex=PHONE)
        running = pool.submit(others)
        started = time.monotonic()
        response = complete(client, guided_json=EXPLOSIVE)
        seconds = time.monotonic() - started
        stop.set()
        running.result()

    assert response.status_code == 400
    message = response.json()["error"]["message"]  # whichever limit is reached first
    assert "more than 10 s" in message or "takes too much memory" in message
    assert seconds < 60  # the limit plus the start of a second compiler
    assert len(gaps) > 20 and max(gaps) < 5


def test_structured_answer_survives_an_engine_crash(server: RunningServer) -> None:
    body = {
        "prompt": "x", "max_tokens": 2000, "seed": 5, "stream": True,
        "guided_regex": "([ab]{3}-){400}", "ignore_eos": True,
    }  # fmt: skip

    def text(kill_after: int | None) -> str:
        pieces: list[str] = []
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as r:
            for line in r.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                    if len(pieces) == kill_after:
                        os.kill(server.engine_pid(), signal.SIGKILL)
        return "".join(pieces)

    undisturbed = text(None)

    assert re.fullmatch("([ab]{3}-){400}", undisturbed)
    assert text(200) == undisturbed
    assert server.metric("engine_restarts_total") == 1
