"""The server on the default model, by the openai SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest

from tests.server.conftest import running_server

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def sdk(default_model: Path) -> Iterator[openai.OpenAI]:
    with running_server("--max-model-len", "2k") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_question_gets_an_answer(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )

    assert "Paris" in answer.choices[0].message.content


def test_the_same_seed_gives_the_same_answer(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    answers = [
        sdk.completions.create(
            model=model, prompt="Once upon a time", max_tokens=16, temperature=1.0, seed=5
        )
        .choices[0]
        .text
        for _ in range(2)
    ]

    assert answers[0] == answers[1]


def test_a_common_beginning_is_found_in_the_cache(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    prompt = list(range(500, 600))
    sdk.completions.create(model=model, prompt=prompt, max_tokens=1)

    again = sdk.completions.create(model=model, prompt=prompt, max_tokens=1)

    assert again.usage.prompt_tokens_details.cached_tokens == 96


def test_an_answer_is_parsed_into_a_pydantic_model(sdk: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=30)
        population: int
        sights: list[Literal["river", "tower", "museum"]] = pydantic.Field(max_length=3)

    answer = sdk.chat.completions.parse(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_format=City,
        max_tokens=200,
        seed=1,
    )

    assert isinstance(answer.choices[0].message.parsed, City)


def test_json_mode_needs_no_word_of_json_in_the_prompt(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_format={"type": "json_object"},
        max_tokens=300,
        temperature=0,
    )

    assert isinstance(json.loads(answer.choices[0].message.content), dict)
