"""Typical calls of the openai SDK, sync and async, with the default model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.conftest import RunningServer, running_server

pytestmark = pytest.mark.model

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[RunningServer]:
    flags = ("--max-model-len", "2k", "--api-key", "secret", "--served-model-name", "small")
    with running_server(*flags) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, **body: object) -> openai.types.chat.ChatCompletion:
    settings = {"messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    return sdk.chat.completions.create(model="small", **{**settings, **body})


def test_models_are_listed_and_retrieved_by_name(sdk: openai.OpenAI) -> None:
    assert [one.id for one in sdk.models.list()] == ["small"]
    assert sdk.models.retrieve("small").owned_by == "portalm"


def test_streamed_chat_equals_the_whole_one(sdk: openai.OpenAI) -> None:
    whole = ask(sdk)

    chunks = list(ask(sdk, stream=True, stream_options={"include_usage": True}))

    said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert said == whole.choices[0].message.content and "Paris" in said
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_the_sdks_stream_helper_collects_the_message(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="small", messages=MESSAGES, max_completion_tokens=24, temperature=0
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()

    assert "Paris" in final.choices[0].message.content
    assert "content.delta" in events and "content.done" in events


def test_chats_have_logprobs(sdk: openai.OpenAI) -> None:
    answer = ask(sdk, logprobs=True, top_logprobs=3, max_completion_tokens=8)

    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(one.logprob == max(top.logprob for top in one.top_logprobs) for one in content)


def test_completions_are_indexed_scored_and_streamed(sdk: openai.OpenAI) -> None:
    asked = {"model": "small", "prompt": ["One, two,", "Red, green,"], "max_tokens": 6, "seed": 1}

    whole = sdk.completions.create(**asked, n=2, logprobs=1)
    pieces = ["", "", "", ""]
    for chunk in sdk.completions.create(**asked, n=2, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    best = sdk.completions.create(**asked, best_of=3)
    scored = sdk.completions.create(
        model="small", prompt="One, two, three", max_tokens=0, echo=True, logprobs=0
    )

    assert [one.text for one in whole.choices] == pieces
    assert ["".join(one.logprobs.tokens) for one in whole.choices] == pieces
    assert [one.index for one in best.choices] == [0, 1]
    assert scored.choices[0].text == "One, two, three"
    assert scored.choices[0].logprobs.token_logprobs[0] is None


def test_errors_raise_the_sdks_exceptions(sdk: openai.OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(sdk, temperature=-1)
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="unknown field 'color'"):
        ask(sdk, extra_body={"color": "red"})
    with pytest.raises(openai.APITimeoutError):
        sdk.with_options(timeout=0.2).completions.create(
            model="small", prompt="Once", max_tokens=1500, extra_body={"ignore_eos": True}
        )

    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"
    assert unknown.value.code == "model_not_found"
    server.wait_for("num_requests_running", 0)


def test_closing_a_stream_aborts_its_request(sdk: openai.OpenAI, server: RunningServer) -> None:
    with sdk.completions.create(
        model="small", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        assert server.metric("num_requests_running") == 1

    server.wait_for("num_requests_running", 0)


def test_async_sdk_sends_concurrent_requests_and_cancels(
    sdk: openai.OpenAI, server: RunningServer
) -> None:
    async def tour() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="secret", max_retries=0
        ) as client:
            asking = [
                client.completions.create(
                    model="small", prompt=f"Number {i} is", max_tokens=8, temperature=0
                )
                for i in range(8)
            ]
            answers = await asyncio.gather(*asking)
            stream = await client.chat.completions.create(
                model="small", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in stream:
                assert chunk.choices[0].delta.role == "assistant"
                break
            await stream.close()
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="small", prompt="x", max_tokens=-1)
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(tour())

    assert all(texts)
    server.wait_for("num_requests_running", 0)
