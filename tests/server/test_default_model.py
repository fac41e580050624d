"""The server with the default model, called by the openai SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import openai
import pydantic
import pytest

from tests.server.conftest import running_server

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def sdk(default_model: Path) -> Iterator[openai.OpenAI]:
    with running_server("--max-model-len", "2k") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_question_is_answered(sdk: openai.OpenAI) -> None:
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


def test_common_prefix_is_found_in_the_cache(sdk: openai.OpenAI) -> None:
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


def test_json_mode_does_not_require_the_word_json_in_the_prompt(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_format={"type": "json_object"},
        max_tokens=300,
        temperature=0,
    )

    assert isinstance(json.loads(answer.choices[0].message.content), dict)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo", "Rome"]}},
            "required": ["city"],
        },
    },
}


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(("choice", "stream"), [("required", True), (NAMED, False)], ids=str)
def test_a_forced_call_fits_its_schema(sdk: openai.OpenAI, choice, stream: bool) -> None:
    answer = sdk.chat.completions.create(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "How is the weather in Oslo?"}],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=60,
        stream=stream,
    )

    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        functions = [call.function for c in chunks for call in c.delta.tool_calls or ()]
        arguments = "".join(function.arguments for function in functions)
        reason = chunks[-1].finish_reason
    else:
        [call] = answer.choices[0].message.tool_calls
        arguments, reason = call.function.arguments, answer.choices[0].finish_reason
    assert json.loads(arguments)["city"] in ("Paris", "Oslo", "Rome")
    assert reason == "tool_calls"


def test_model_can_choose_whether_to_call_tools(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=sdk.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        tools=[WEATHER],
        temperature=0,
        max_tokens=24,
    )

    [choice] = answer.choices
    assert choice.message.content or choice.message.tool_calls


def test_response_streams_and_continues_from_the_previous_one(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    with sdk.responses.stream(
        model=model, input="What is the capital of France?", max_output_tokens=24, temperature=0
    ) as stream:
        first = stream.get_final_response()
    second = sdk.responses.create(
        model=model, input="Say it again.", previous_response_id=first.id, max_output_tokens=8
    )

    assert "Paris" in first.output_text
    assert second.usage.input_tokens > first.usage.total_tokens


@pytest.mark.slow
def test_500_streams_at_once_have_exact_token_counts(default_model: Path) -> None:
    async def stream(http: httpx.AsyncClient, i: int) -> tuple[int, str]:
        body = {
            "prompt": [1000 + i, 2000 + i, 3000 + i],
            "max_tokens": 16,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        response = await http.post("/v1/completions", json=body)
        lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        reason = chunks[-2]["choices"][0]["finish_reason"]
        return chunks[-1]["usage"]["completion_tokens"], reason

    async def run(url: str) -> list[tuple[int, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            return await asyncio.gather(*(stream(http, i) for i in range(500)))

    with running_server("--max-model-len", "1k") as server:
        found = asyncio.run(run(server.url))
        server.wait_for("num_requests_running", 0)
        used = server.metric("kv_blocks_used")

    assert found == [(16, "length")] * 500
    assert used == 0
