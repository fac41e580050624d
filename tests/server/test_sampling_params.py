"""Every field of SamplingParams has its effect over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from portalm.sampling_params import SamplingParams
from tests.server.conftest import (
    BYTE_0,
    EOS,
    RunningServer,
    make_byte_model_folder,
    running_server,
)

PROMPT = "the well"
LETTERS = [BYTE_0 + ord(c) for c in "abcdefgh"]
END_AT_ONCE = {str(EOS): 100.0}


@pytest.fixture(scope="module")
def http(byte_server: RunningServer) -> Iterator[httpx.Client]:
    with byte_server.client() as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    settings = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = http.post("/v1/completions", json={**settings, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def ids(choices: list[dict[str, Any]]) -> list[int]:
    return choices[0]["token_ids"]


def ranks(choices: list[dict[str, Any]]) -> list[int]:
    """Rank of each sampled token among the top logprobs; 1 is the most likely."""
    logprobs = choices[0]["logprobs"]
    return [
        1 + sum(other > own for other in top.values())
        for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ]


def most_common(choices: list[dict[str, Any]]) -> int:
    """Number of occurrences of the most frequent token."""
    return Counter(ids(choices)).most_common(1)[0][1]


@dataclass
class Case:
    """One field: `shows` compares the answers to `base` and to `base` with `field`."""

    field: dict[str, Any]
    shows: Callable[[Any, Any], bool]
    base: dict[str, Any]


def case(shows: Callable[[Any, Any], bool], *, base: dict[str, Any] | None = None, **field: Any):
    return Case(field, shows, base or {})


CASES = {
    "n": case(
        lambda before, now: len(now) == 3 and len({tuple(one["token_ids"]) for one in now}) == 3,
        base={"temperature": 1, "seed": 1},
        n=3,
    ),
    "presence_penalty": case(
        lambda before, now: len(set(ids(before))) < len(set(ids(now))),
        base={"allowed_token_ids": LETTERS, "max_tokens": 8},
        presence_penalty=2,
    ),
    "frequency_penalty": case(
        lambda before, now: most_common(before) > 2 * most_common(now),
        base={"allowed_token_ids": LETTERS, "max_tokens": 16},
        frequency_penalty=2,
    ),
    "repetition_penalty": case(
        # letters in the prompt are penalized too
        lambda before, now: (
            set(before[0]["text"]) & set("efgh") and set(now[0]["text"]) <= set("abcd")
        ),
        base={"prompt": "efgh", "allowed_token_ids": LETTERS, "max_tokens": 4},
        repetition_penalty=1e6,
    ),
    "temperature": case(
        lambda before, now: set(ranks(before)) == {1} and max(ranks(now)) > 1,
        base={"logprobs": 20, "seed": 1},
        temperature=3,
    ),
    "top_p": case(
        lambda before, now: max(ranks(before)) > 1 and set(ranks(now)) == {1},
        base={"temperature": 2, "logprobs": 20, "seed": 1},
        top_p=1e-4,
    ),
    "top_k": case(
        lambda before, now: max(ranks(before)) > 3 and max(ranks(now)) in (2, 3),
        base={"temperature": 2, "logprobs": 20, "seed": 1},
        top_k=3,
    ),
    "min_p": case(
        lambda before, now: max(ranks(before)) > 1 and set(ranks(now)) == {1},
        base={"temperature": 2, "logprobs": 20, "seed": 1},
        min_p=1.0,
    ),
    "seed": case(
        lambda before, now: ids(before) != ids(now),
        base={"temperature": 1, "seed": 1},
        seed=2,
    ),
    "stop": case(
        lambda before, now: (
            "c" in before[0]["text"]
            and now[0]["text"] == before[0]["text"].split("c")[0]
            and now[0]["stop_reason"] == "c"
        ),
        base={"allowed_token_ids": LETTERS[:3], "temperature": 1, "seed": 1},
        stop="c",
    ),
    "stop_token_ids": case(
        lambda before, now: (
            ids(now) == ids(before)[: ids(before).index(LETTERS[2]) + 1]
            and now[0]["stop_reason"] == LETTERS[2]
            and now[0]["finish_reason"] == "stop"
        ),
        base={"allowed_token_ids": LETTERS[:3], "temperature": 1, "seed": 1},
        stop_token_ids=[LETTERS[2]],
    ),
    "ignore_eos": case(
        lambda before, now: ids(before) == [EOS] and ids(now) == [EOS] * 16,
        base={"logit_bias": END_AT_ONCE, "ignore_eos": False},
        ignore_eos=True,
    ),
    "max_tokens": case(
        lambda before, now: len(ids(before)) == 16 and ids(now) == ids(before)[:5],
        max_tokens=5,
    ),
    "min_tokens": case(
        lambda before, now: ids(before) == [EOS] and ids(now).index(EOS) == 5 == len(ids(now)) - 1,
        base={"logit_bias": END_AT_ONCE, "ignore_eos": False},
        min_tokens=5,
    ),
    "logprobs": case(
        lambda before, now: (
            before[0]["logprobs"] is None
            and [len(top) for top in now[0]["logprobs"]["top_logprobs"]] == [2] * 16
        ),
        logprobs=2,
    ),
    "prompt_logprobs": case(
        lambda before, now: (
            now[0]["prompt_logprobs"][0] is None
            and [len(one) >= 2 for one in now[0]["prompt_logprobs"][1:]]
            == [True] * (len(now[0]["prompt_token_ids"]) - 1)
        ),
        prompt_logprobs=2,
    ),
    "detokenize": case(
        lambda before, now: now[0]["text"] == "" and ids(now) == ids(before),
        detokenize=False,
    ),
    "skip_special_tokens": case(
        lambda before, now: before[0]["text"] == "" and now[0]["text"] == "<s>" * 16,
        base={"allowed_token_ids": [1]},
        skip_special_tokens=False,
    ),
    "spaces_between_special_tokens": case(
        # byte-level tokenizers never add spaces; tests/unit/test_detokenizer.py has one that does
        lambda before, now: now[0]["text"] == before[0]["text"] == "<s>" * 16,
        base={"allowed_token_ids": [1], "skip_special_tokens": False},
        spaces_between_special_tokens=False,
    ),
    "include_stop_str_in_output": case(
        lambda before, now: now[0]["text"] == before[0]["text"] + "c",
        base={"allowed_token_ids": LETTERS[:3], "temperature": 1, "seed": 1, "stop": ["c"]},
        include_stop_str_in_output=True,
    ),
    "logit_bias": case(
        lambda before, now: ids(now) == [LETTERS[3]] * 16,
        logit_bias={str(LETTERS[3]): 100},
    ),
    "allowed_token_ids": case(
        lambda before, now: not set(ids(before)) <= set(LETTERS) and set(ids(now)) <= set(LETTERS),
        base={"temperature": 1, "seed": 1},
        allowed_token_ids=LETTERS,
    ),
    "bad_words": case(
        lambda before, now: "ab" in before[0]["text"] and "ab" not in now[0]["text"],
        base={
            "allowed_token_ids": LETTERS[:2], "temperature": 1, "seed": 1, "max_tokens": 40,
        },
        bad_words=["ab"],
    ),
    "logits_processors": case(
        lambda before, now: most_common(before) > 1 and most_common(now) == 1,
        logits_processors={"no_repeats": {"last": 99}},
    ),
}  # fmt: skip


ELSEWHERE = {"structured_outputs"}
"""Fields that have their own test file."""


def test_every_field_has_a_case() -> None:
    assert set(CASES) == {field.name for field in fields(SamplingParams)} - ELSEWHERE


@pytest.mark.parametrize("name", CASES)
def test_field_has_its_effect(http: httpx.Client, name: str) -> None:
    one = CASES[name]

    before, now = complete(http, **one.base), complete(http, **{**one.base, **one.field})

    assert one.shows(before, now), (before, now)


@pytest.mark.parametrize("name", [name for name in CASES if "logprobs" not in name])
def test_chat_and_completion_of_the_same_prompt_have_the_same_answer(
    http: httpx.Client, name: str
) -> None:
    asked = {**CASES[name].base, **CASES[name].field}
    body = {"temperature": 0, "ignore_eos": True, "max_tokens": 16, **asked}
    messages = [{"role": "user", "content": body.pop("prompt", PROMPT)}]
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}

    chat = http.post("/v1/chat/completions", json={**body, "messages": messages}).json()

    said = [choice["message"]["content"] for choice in chat["choices"]]
    assert said == [choice["text"] for choice in complete(http, **asked)]


def test_same_seed_samples_the_same_tokens_alone_and_in_a_batch(http: httpx.Client) -> None:
    asked = {"temperature": 1, "max_tokens": 32, "seed": 7}

    alone = complete(http, **asked)
    crowd = complete(http, **asked, prompt=["another", PROMPT, "he", "tell all", "x" * 60], n=2)

    [among] = [one for one in crowd if one["index"] == 2]  # the second prompt's first answer
    assert among["token_ids"] == alone[0]["token_ids"]


def test_requests_have_the_models_defaults_and_the_log_lists_them(tmp_path: Path) -> None:
    folder = make_byte_model_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"top_k": 1, "max_new_tokens": 6}')
    flags = ("--load-format", "dummy", "--dtype", "float32")

    with running_server(str(folder), *flags) as server, server.client() as http:
        assert any("top_k=1, max_tokens=6, from the model" in line for line in server.output)
        unset = [ids(complete(http, temperature=None, seed=seed)) for seed in range(3)]
        given = [ids(complete(http, temperature=1, top_k=0, seed=seed)) for seed in range(3)]
        right = ids(complete(http, max_tokens=6))
        body = {"messages": [{"role": "user", "content": PROMPT}], "ignore_eos": True}
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]

    assert unset == [right] * 3
    assert len({tuple(one) for one in given}) > 1
    assert usage["completion_tokens"] == 6
