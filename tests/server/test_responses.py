"""The Responses API, called by the openai SDK."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pydantic
import pytest

from portalm.server.chat_plan import AnswerFormat
from portalm.server.responses_store import (
    ResponseStore,
    ResponseUnknown,
    StoredResponse,
    StoreFull,
)
from portalm.server.state import ServerState
from tests.server.scripted import ScriptedServer, make_byte_tokenizer, scripted_server
from tests.server.test_tools import TEMPLATE, TWO_CALLS, WEATHER

TOOL = {"type": "function", **WEATHER["function"]}
CLOCK = {"type": "function", "name": "get_time"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = make_byte_tokenizer(tmp_path_factory.mktemp("scripted") / "model", TEMPLATE)
    form = AnswerFormat(reasoning_parser="qwen3")
    with scripted_server(folder, answer_format=form) as running:
        yield running


@pytest.fixture(autouse=True)
def reset_script(server: ScriptedServer) -> Iterator[None]:
    yield
    server.client.delay_s, server.client.finish_reason = 0.0, "stop"


def create(server: ScriptedServer, answer: str, /, **settings):
    server.client.text = answer
    return server.sdk.responses.create(**{"model": "scripted", "input": "Hello?", **settings})


def refusal(server: ScriptedServer, **settings) -> tuple[str, str]:
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, "", **settings)
    return caught.value.param, caught.value.body["message"]


# -- not streamed -----------------------------------------------------------------------------


def test_response_has_openai_shape(server: ScriptedServer) -> None:
    response = create(
        server,
        "Hello there.",
        instructions="Be kind.",
        max_output_tokens=50,
        metadata={"a": "b"},
        temperature=0.5,
    )

    assert response.object == "response" and response.status == "completed"
    assert response.output_text == "Hello there."
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.output_tokens == 4
    assert response.usage.total_tokens == response.usage.input_tokens + 4
    assert (response.metadata, response.temperature) == ({"a": "b"}, 0.5)
    assert server.client.prompt == "system: Be kind.|user: Hello?|assistant: "
    assert server.client.asked[-1][1].max_tokens == 50


def test_calls_and_reasoning_are_output_items(server: ScriptedServer) -> None:
    response = create(server, f"<think>Hm.</think>{TWO_CALLS}", tools=[TOOL, CLOCK])

    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, weather, clock = response.output
    assert reasoning.content[0].text == "Hm."
    assert message.content[0].text == "Let me see."
    assert (weather.name, weather.arguments) == ("get_weather", '{"city":"Paris"}')
    assert clock.call_id != weather.call_id
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < 10


def test_input_items_become_messages(server: ScriptedServer) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}', "call_id": "call_1"}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {"type": "function_call", **call},
        {"type": "function_call_output", "call_id": "call_1", "output": "Rain."},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
        {"role": "user", "content": "Really?"},
    ]
    create(server, "Yes.", input=items)

    assert server.client.prompt == (
        "system: Be kind.|user: Weather?|assistant:  calls get_weather(Paris)|tool: Rain.|"
        "assistant: It rains.|user: Really?|assistant: "
    )


def test_response_continues_the_previous_one(server: ScriptedServer) -> None:
    first = create(server, "I am fine.", instructions="Be kind.")
    second = create(server, "Bye.", input="And you?", previous_response_id=first.id)

    assert server.client.prompt == ("user: Hello?|assistant: I am fine.|user: And you?|assistant: ")
    assert server.sdk.responses.retrieve(second.id).output_text == "Bye."
    items = server.sdk.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.role for item in items.data] == ["user", "assistant"]
    assert items.has_more


def test_response_that_is_not_stored_cannot_be_retrieved(server: ScriptedServer) -> None:
    kept = create(server, "Hi.")
    server.sdk.responses.delete(kept.id)
    for gone in (create(server, "Hi.", store=False).id, kept.id):
        with pytest.raises(openai.NotFoundError):
            server.sdk.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as caught:
            create(server, "Hi.", previous_response_id=gone)
        assert caught.value.param == "previous_response_id"


def test_truncated_answer_is_incomplete(server: ScriptedServer) -> None:
    server.client.finish_reason = "length"
    response = create(server, "Once upon")

    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_sdk_parses_the_answer_into_its_schema(server: ScriptedServer) -> None:
    class City(pydantic.BaseModel):
        name: str

    server.client.text = '{"name": "Paris"}'
    response = server.sdk.responses.parse(
        model="scripted",
        input="Which city?",
        text_format=City,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )

    assert response.output_parsed == City(name="Paris")
    schema = json.loads(server.client.asked[-1][1].structured_outputs.json)
    assert schema["properties"]["name"]["type"] == "string"


def test_function_call_can_be_forced(server: ScriptedServer) -> None:
    response = create(
        server,
        '{"city": "Rome"}',
        tools=[TOOL],
        tool_choice={"type": "function", "name": "get_weather"},
        reasoning={"effort": "none"},
    )

    assert response.output[0].arguments == '{"city":"Rome"}'


# -- streamed ---------------------------------------------------------------------------------


def test_stream_events_come_in_order(server: ScriptedServer) -> None:
    text = f"<think>Hm.</think>{TWO_CALLS}"
    events = list(create(server, text, tools=[TOOL, CLOCK], stream=True))

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    text_item = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
    assert once == [
        "created",
        "in_progress",
        "output_item.added",
        *[kind.format("reasoning_text") for kind in text_item],
        "output_item.done",
        "output_item.added",
        *[kind.format("output_text") for kind in text_item],
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1].response
    deltas = {}
    for event in events:
        if event.type.endswith(".delta"):
            deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
    assert list(deltas) == [item.id for item in final.output]
    assert list(deltas.values()) == ["Hm.", "Let me see.", '{"city":"Paris"}', "{}"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    assert final.usage.output_tokens > 10


def test_sdk_stream_helper_assembles_the_response(server: ScriptedServer) -> None:
    server.client.text = "Hello there."
    with server.sdk.responses.stream(model="scripted", input="Hello?") as stream:
        response = stream.get_final_response()

    assert response.output_text == "Hello there."
    assert server.sdk.responses.retrieve(response.id).output_text == "Hello there."


def test_client_disconnect_cancels_its_response(server: ScriptedServer) -> None:
    server.client.delay_s = 0.05
    stream = create(server, "word " * 500, stream=True)
    response_id = next(iter(stream)).response.id
    stream.close()

    wait_until(lambda: server.client.num_open == 0)
    wait_until(lambda: response_id in server.state.responses._tenants.get("", {}))
    assert server.sdk.responses.retrieve(response_id).status == "cancelled"


def test_failure_is_a_status_or_the_last_event(server: ScriptedServer) -> None:
    server.client.finish_reason = "error"

    for stream in (False, True):
        with pytest.raises(openai.InternalServerError):
            create(server, "", stream=stream)
    events = list(create(server, "Hello there.", stream=True))

    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "the script says so" in events[-1].response.error.message
    assert events[-1].response.output[0].status == "incomplete"


def test_failure_of_a_background_response_is_stored(server: ScriptedServer) -> None:
    server.client.finish_reason = "error"
    queued = create(server, "", background=True)

    wait_until(lambda: server.sdk.responses.retrieve(queued.id).status == "failed")
    assert server.sdk.responses.retrieve(queued.id).error.code == "server_error"


# -- in the background ------------------------------------------------------------------------


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "condition not met within 10 s"
        time.sleep(0.02)


def test_background_response_continues_without_its_client(server: ScriptedServer) -> None:
    queued = create(server, "Hello there.", background=True)

    assert queued.status == "queued" and queued.background
    wait_until(lambda: server.sdk.responses.retrieve(queued.id).status == "completed")
    assert server.sdk.responses.retrieve(queued.id).output_text == "Hello there."


@pytest.mark.parametrize("stream", [False, True])
def test_background_response_is_rejected_while_the_queue_is_full(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(server.client, "num_queued", 1, raising=False)
    monkeypatch.setattr(server.state, "max_num_queued_reqs", 1)
    before = {*server.state.responses._tenants.get("", {})}

    with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
        create(server, "Hello there.", background=True, stream=stream)

    assert {*server.state.responses._tenants.get("", {})} == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/responses", {"input": "Hello", "background": True}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_is_admitted_once(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, stream: bool
) -> None:
    admitted: list[tuple[int, int]] = []
    admit = ServerState.admit
    monkeypatch.setattr(
        ServerState, "admit", lambda self, *args: (admitted.append(args), admit(self, *args))
    )

    response = server.http.post(path, json={**body, "stream": stream})

    assert response.status_code == 200
    [(num_answers, num_tokens)] = admitted
    assert num_answers == 1 and num_tokens > 0


def test_background_response_can_be_canceled(server: ScriptedServer) -> None:
    server.client.delay_s = 0.05
    queued = create(server, "word " * 500, background=True)
    wait_until(lambda: server.client.num_open == 1)
    with pytest.raises(openai.BadRequestError):
        create(server, "", previous_response_id=queued.id)

    cancelled = server.sdk.responses.cancel(queued.id)

    assert cancelled.status == "cancelled"
    wait_until(lambda: server.client.num_open == 0)
    assert server.sdk.responses.cancel(queued.id).status == "cancelled"


def test_background_stream_can_be_resumed(server: ScriptedServer) -> None:
    server.client.delay_s = 0.01
    stream = create(server, "word " * 20, background=True, stream=True)
    seen = [next(iter(stream)) for _ in range(5)]
    stream.close()

    rest = list(server.sdk.responses.retrieve(seen[0].response.id, stream=True, starting_after=4))

    assert [event.sequence_number for event in [*seen, *rest]] == list(range(5 + len(rest)))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == "word " * 20


def test_only_background_responses_can_be_canceled(
    server: ScriptedServer,
) -> None:
    response = create(server, "Hi.")

    with pytest.raises(openai.BadRequestError, match="background"):
        server.sdk.responses.cancel(response.id)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_unsupported_parameters_are_rejected_by_name(
    server: ScriptedServer, settings, param
) -> None:
    assert refusal(server, **settings)[0] == param


# -- the store --------------------------------------------------------------------------------


def stored(response_id: str, *, size: int = 0, is_running: bool = False) -> StoredResponse:
    one = StoredResponse({"id": response_id, "text": "x" * size}, [])
    one.task = SimpleNamespace(done=lambda: not is_running, cancel=lambda: None)
    return one


def kept(store: ResponseStore, tenant: str) -> list[str]:
    return list(store._tenants.get(tenant, {}))


def test_tenant_sees_only_its_own_responses(server: ScriptedServer) -> None:
    store = ResponseStore()
    store.put("a", stored("1"))

    assert store.get("a", "1").response["id"] == "1"
    for act in (store.get, store.delete):
        with pytest.raises(ResponseUnknown):
            act("b", "1")


def test_oldest_responses_are_dropped_when_the_store_is_full() -> None:
    store = ResponseStore(max_responses=6, tenant_share=0.5)
    for name in "1234":
        store.put("a", stored(name))
    assert kept(store, "a") == ["2", "3", "4"]

    for name in "567":
        store.put("b", stored(name))
    store.put("c", stored("8"))
    assert sum(len(kept(store, tenant)) for tenant in "abc") == 6
    assert kept(store, "c") == ["8"]


def test_bytes_are_counted_and_limited_per_tenant() -> None:
    store = ResponseStore(max_bytes=1000, tenant_share=0.5)
    store.put("a", stored("1", size=200))
    store.put("b", stored("2", size=200))
    store.put("a", stored("3", size=300))

    assert (kept(store, "a"), kept(store, "b")) == (["3"], ["2"])
    with pytest.raises(StoreFull):
        store.put("a", stored("4", size=600))
    assert kept(store, "a") == []


def test_running_responses_are_not_dropped() -> None:
    store = ResponseStore(max_responses=4, tenant_share=0.5)
    for name in "12":
        store.put("a", stored(name, is_running=True))

    with pytest.raises(StoreFull):
        store.put("a", stored("3"))

    assert kept(store, "a") == ["1", "2"]


def test_events_have_names_and_the_stream_has_no_done_marker(server: ScriptedServer) -> None:
    server.client.text = "Hi."
    body = {"input": "Hello?", "stream": True}
    text = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20).text

    blocks = text.strip().split("\n\n")
    assert all(block.startswith("event: response.") for block in blocks)
    assert json.loads(blocks[-1].split("data: ")[1])["type"] == "response.completed"
