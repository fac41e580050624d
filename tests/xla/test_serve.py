"""`portalm serve --device tpu` through the OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.conftest import running_server
from tests.tiny import add_byte_tokenizer, make_config_folder

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "yes"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("serve") / "tiny"))
    flags = ("--load-format", "dummy", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
    named = ("--device", "tpu", "--served-model-name", "tiny")
    with running_server(str(folder), *flags, *named) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def sampled_text(sdk: openai.OpenAI, seed: int) -> str:
    answer = sdk.completions.create(
        model="tiny", prompt="Once upon", max_tokens=24, temperature=1.0, seed=seed
    )
    return answer.choices[0].text


def test_a_streamed_answer_equals_the_whole_answer_for_the_same_seed(
    sdk: openai.OpenAI,
) -> None:
    stream = sdk.completions.create(
        model="tiny", prompt="Once upon", max_tokens=24, temperature=1.0, seed=5, stream=True
    )

    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]

    assert len(pieces) > 2
    assert "".join(pieces) == sampled_text(sdk, 5)
    assert "".join(pieces) != sampled_text(sdk, 6)


def test_logprobs_include_the_sampled_and_the_most_likely_tokens(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=24,
        temperature=1.0,
        seed=5,
        logprobs=True,
        top_logprobs=3,
    )

    found = answer.choices[0].logprobs.content
    assert len(found) == 24
    for one in found:
        top = [entry.logprob for entry in one.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert len(top) == 3
        assert one.logprob <= top[0] < 0.0


def test_an_answer_follows_its_schema(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=60,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
    )

    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"ok", "kind"}
    assert found["kind"] in ("a", "yes")
    assert isinstance(found["ok"], bool)
