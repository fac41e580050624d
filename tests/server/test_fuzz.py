"""Random request bodies get an answer or an error that says what is wrong, never a 5xx."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import RunningServer

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([0, -1, 1, 2, 1.5, "", "w5", "\ud800", "\x00", "5", math.nan, math.inf])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
SMALL = st.integers(1, 4)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "alias"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "n": SMALL,
    "max_tokens": SMALL,
    "min_tokens": st.integers(0, 2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 5),
    "min_p": st.floats(0, 1),
    "seed": st.integers(),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 511), max_size=3),
    "ignore_eos": st.booleans(),
    "prompt_logprobs": st.integers(0, 3),
    "logit_bias": st.dictionaries(st.integers(0, 511).map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 511), min_size=1, max_size=3),
    "bad_words": st.lists(st.sampled_from(["w7", "w8 w9"]), max_size=2),
    "priority": st.integers(-5, 5),
    "request_id": st.text(max_size=8),
    "cache_salt": st.text(max_size=8),
    "user": st.text(max_size=3),
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", ""])},
        optional={"content": st.text(max_size=4) | JUNK, "tool_calls": JUNK, "name": JUNK},
    ),
    max_size=3,
)
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/completions": {
        **COMMON,
        "prompt": st.sampled_from(["w5 w6", ["w5", "w6"], [5, 6], [[5], [6, 7]], ""]),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 3),
    },
    "/v1/chat/completions": {
        **COMMON,
        "messages": MESSAGES,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 3),
        "max_completion_tokens": SMALL,
        "chat_template_kwargs": JUNK,
        "response_format": JUNK,
        "tools": JUNK,
    },
    "/tokenize": {"prompt": st.text(max_size=9), "messages": MESSAGES, "model": COMMON["model"]},
    "/detokenize": {"tokens": st.lists(st.integers(0, 511), max_size=4)},
}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> Any:
    """Generate a valid body in which some fields are omitted and some are junk."""
    if draw(st.integers(0, 20)) == 0:
        return draw(JUNK)
    fields = FIELDS[path]
    names = draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=6))
    required = sorted({"prompt", "messages", "tokens", "max_tokens"} & fields.keys())
    body = {name: draw(fields[name]) for name in [*required, *names]}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=2)):
        body[name] = draw(JUNK)
    if draw(st.integers(0, 10)) == 0:
        body[draw(st.text(max_size=4))] = draw(JUNK)
    return body


def check(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})

    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"]
    elif response.headers["Content-Type"].startswith("text/event-stream"):
        events = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert not any("error" in json.loads(event) for event in events[:-1])


@pytest.mark.parametrize("path", FIELDS)
def test_random_body_gets_an_answer_or_a_client_error(
    null_server: RunningServer, path: str
) -> None:
    with null_server.client() as http:

        @settings(max_examples=120, suppress_health_check=list(HealthCheck))
        @given(bodies(path))
        def run(body: Any) -> None:
            check(http, path, json.dumps(body).encode())

        run()
        assert http.get("/health/ready").status_code == 200
    null_server.wait_for("num_requests_running", 0)
    assert null_server.metric("engine_restarts_total") == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
     b'{"prompt": "w5", "prompt": 5}', b'{"prompt": "\\ud800"}', b"1e999", b"9" * 5000,
     b'{"prompt": [' + b"9" * 5000 + b"]}", b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
     b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
     b'{"messages": [{"role": "user", "content": "w5", "x": ' + b"[" * 400 + b"]" * 400 + b"}]}"],
    ids=lambda content: content[:16].decode(errors="replace"),
)  # fmt: skip
@pytest.mark.parametrize("path", FIELDS)
def test_malformed_or_extreme_json_gets_an_answer_or_a_client_error(
    null_server: RunningServer, path: str, content: bytes
) -> None:
    with null_server.client() as http:
        check(http, path, content)
