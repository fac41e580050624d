"""Tool calls and reasoning in chat completions, called by the openai SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pydantic
import pytest

from portalm.errors import ConfigError
from portalm.server.chat_plan import AnswerFormat
from portalm.server.schemas.tools import check_tools
from portalm.text import load_tokenizer
from tests.server.scripted import ScriptedServer, make_byte_tokenizer, scripted_server

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }};{% endfor %}]"
    "{# <tool_call></tool_call> #}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %} calls {{ c.function.name }}"
    "({{ c.function.arguments.city }}){% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
ASK = [{"role": "user", "content": "How is the weather?"}]
TWO_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
    '</tool_call>\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = make_byte_tokenizer(tmp_path_factory.mktemp("scripted") / "model", TEMPLATE)
    with scripted_server(folder) as running:
        yield running


@pytest.fixture(scope="module")
def reasoning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = make_byte_tokenizer(tmp_path_factory.mktemp("scripted") / "model", TEMPLATE)
    with scripted_server(folder, answer_format=AnswerFormat(reasoning_parser="qwen3")) as running:
        yield running


def chat(server: ScriptedServer, text: str, **settings):
    server.client.text = text
    settings = {"messages": ASK, "tools": [WEATHER, TIME], **settings}
    return server.sdk.chat.completions.create(model="scripted", **settings)


def refusal(server: ScriptedServer, **settings) -> tuple[str, str]:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, "", **settings)
    return caught.value.param, caught.value.body["message"]


# -- calls ------------------------------------------------------------------------------------


def test_calls_are_part_of_the_message(server: ScriptedServer) -> None:
    [choice] = chat(server, TWO_CALLS).choices

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    weather, clock = choice.message.tool_calls
    assert (weather.type, weather.function.name) == ("function", "get_weather")
    assert json.loads(weather.function.arguments) == {"city": "Paris"}
    assert clock.function.arguments == "{}"
    assert weather.id.startswith("call_") and weather.id != clock.id
    assert server.client.prompt.startswith("[get_weather;get_time;]user: How")


def test_streamed_calls_have_openai_chunk_shapes(server: ScriptedServer) -> None:
    chunks = list(chat(server, TWO_CALLS, stream=True))

    deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    begins = [d for d in deltas if d.id]
    assert [(d.index, d.type, d.function.name) for d in begins] == [
        (0, "function", "get_weather"),
        (1, "function", "get_time"),
    ]
    assert all(d.function.arguments == "" for d in begins)
    assert all(d.function.name is None and d.type is None for d in deltas if not d.id)
    first = [d.function.arguments for d in deltas if d.index == 0]
    assert "".join(first) == '{"city":"Paris"}' and len(first) > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Let me see."
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def test_sdk_stream_helper_assembles_the_message(server: ScriptedServer) -> None:
    class GetWeather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    server.client.text = TWO_CALLS
    with server.sdk.chat.completions.stream(
        model="scripted", messages=ASK, tools=[tool], parallel_tool_calls=False
    ) as stream:
        message = stream.get_final_completion().choices[0].message

    [call] = message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Paris")


def test_n_answers_are_parsed_independently(server: ScriptedServer) -> None:
    whole = chat(server, TWO_CALLS, n=2)
    assert [len(choice.message.tool_calls) for choice in whole.choices] == [2, 2]

    chunks = list(chat(server, TWO_CALLS, n=2, stream=True))
    for index in (0, 1):
        mine = [c.choices[0].delta for c in chunks if c.choices[0].index == index]
        calls = [call for delta in mine for call in delta.tool_calls or ()]
        assert "".join(call.function.arguments for call in calls) == '{"city":"Paris"}{}'


def test_without_parallel_calls_only_the_first_is_returned(server: ScriptedServer) -> None:
    [choice] = chat(server, TWO_CALLS, parallel_tool_calls=False).choices

    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]


def test_a_malformed_call_is_content(server: ScriptedServer) -> None:
    [choice] = chat(server, "<tool_call>get_weather(Paris)").choices

    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.content == "<tool_call>get_weather(Paris)"


def test_truncated_answer_keeps_its_finish_reason(server: ScriptedServer) -> None:
    server.client.finish_reason = "length"
    try:
        [choice] = chat(server, TWO_CALLS[:70]).choices
    finally:
        server.client.finish_reason = "stop"

    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_tool_choice_none_hides_the_tools_and_disables_parsing(server: ScriptedServer) -> None:
    [choice] = chat(server, TWO_CALLS, tool_choice="none").choices

    assert choice.message.content == TWO_CALLS
    assert server.client.prompt.startswith("user: How")


def test_calls_and_their_results_are_in_the_prompt(server: ScriptedServer) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    history = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    chat(server, "It rains.", messages=history)

    assert server.client.prompt.endswith(
        "assistant:  calls get_weather(Paris)|tool: Rain.|assistant: "
    )


def test_named_function_is_forced_by_its_schema(server: ScriptedServer) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    [answer] = chat(server, '{"city": "Paris"}', tool_choice=choice).choices

    [call] = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
    assert answer.message.content is None
    assert answer.finish_reason == "tool_calls"
    schema = json.loads(server.client.asked[-1][1].structured_outputs.json)
    assert schema == WEATHER["function"]["parameters"]


def test_required_forces_a_list_of_calls(server: ScriptedServer) -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'
    for stream in (False, True):
        answer = chat(server, text, tool_choice="required", stream=stream)
        if stream:
            deltas = [d for c in answer for d in c.choices[0].delta.tool_calls or ()]
            assert "".join(d.function.arguments for d in deltas) == '{"city":"Rome"}'
        else:
            [call] = answer.choices[0].message.tool_calls
            assert (call.function.name, call.function.arguments) == (
                "get_weather",
                '{"city":"Rome"}',
            )
    schema = json.loads(server.client.asked[-1][1].structured_outputs.json)
    assert schema["type"] == "array" and len(schema["items"]["anyOf"]) == 2


def test_references_inside_a_schema_are_rewritten() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#"}},
        "$defs": {"A": {"type": "integer"}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}

    forced = check_tools([tool], "required", is_parallel=False).forced_schema()

    properties = forced["$defs"]["f"]["properties"]
    assert properties == {"a": {"$ref": "#/$defs/f/$defs/A"}, "b": {"$ref": "#/$defs/f"}}
    assert forced["maxItems"] == 1


# -- refusals ---------------------------------------------------------------------------------

BAD_TOOLS = {  # name: (tools, part of the error message)
    "kind": ([{"type": "web_search"}], "tools[0] must be of type 'function'"),
    "no function": ([{"type": "function"}], "tools[0].function must be an object"),
    "name": ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    "no name": ([{"type": "function", "function": {}}], "tools[0].function.name"),
    "field": (
        [{"type": "function", "function": {"name": "f", "x": 1}}],
        "function.x is an unknown field",
    ),
    "schema": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
        "tools[0].function.parameters",
    ),
    "twice": ([TIME, TIME], "two functions named 'get_time'"),
    "many": ([TIME] * 129, "the limit is 128"),
    "large": (
        [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}],
        "the limit is 262144",
    ),
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_invalid_tools_are_rejected(server: ScriptedServer, name: str) -> None:
    tools, text = BAD_TOOLS[name]

    param, message = refusal(server, tools=tools)

    assert param == "tools" and text in message


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("sometimes", "must be 'none', 'auto', 'required'"),
        ({"type": "function", "function": {"name": "other"}}, "get_weather, get_time"),
        ({"type": "allowed_tools", "allowed_tools": {}}, "send only those"),
    ],
    ids=["word", "name", "kind"],
)
def test_invalid_tool_choice_is_rejected(server: ScriptedServer, choice, text: str) -> None:
    param, message = refusal(server, tool_choice=choice)

    assert param == "tool_choice" and text in message


def test_tool_choice_without_tools_is_rejected(server: ScriptedServer) -> None:
    assert refusal(server, tools=[], tool_choice="required")[0] == "tool_choice"


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tool_choice_and_response_format_exclude_each_other(
    server: ScriptedServer, choice: str
) -> None:
    param, message = refusal(server, tool_choice=choice, response_format={"type": "json_object"})

    assert param == "tool_choice" and "response_format" in message


def test_template_with_unknown_call_format_needs_the_flag(server: ScriptedServer) -> None:
    body = {"chat_template": "{{ tools }}{{ messages[0].content }}"}

    param, message = refusal(server, extra_body=body)

    assert param == "tool_choice" and "--tool-call-parser" in message


def test_template_without_tools_gets_them_as_text(server: ScriptedServer) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    [choice] = chat(server, TWO_CALLS, extra_body={"chat_template": template}).choices

    assert len(choice.message.tool_calls) == 2
    assert server.client.prompt.startswith("system: You may call functions")
    assert '"name": "get_weather"' in server.client.prompt


# -- reasoning --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_its_own_field(reasoning_server: ScriptedServer, stream: bool) -> None:
    answer = chat(reasoning_server, f"<think>\nHm.\n</think>\n\n{TWO_CALLS}", stream=stream)

    if stream:
        deltas = [chunk.choices[0].delta.model_dump() for chunk in answer]
        found = {
            name: "".join(delta.get(name) or "" for delta in deltas)
            for name in ("reasoning_content", "reasoning", "content")
        }
    else:
        found = answer.choices[0].message.model_dump()
        assert len(found["tool_calls"]) == 2
    assert found["reasoning_content"] == found["reasoning"] == "Hm."
    assert found["content"] == "Let me see."


def test_prompt_that_closes_the_reasoning_gets_content_only(
    reasoning_server: ScriptedServer,
) -> None:
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    [choice] = chat(reasoning_server, "<think> is a tag.", extra_body=body).choices

    assert choice.message.content == "<think> is a tag."


def test_forced_calls_need_reasoning_turned_off(reasoning_server: ScriptedServer) -> None:
    param, message = refusal(reasoning_server, tool_choice="required")
    assert param == "tool_choice" and "enable_thinking" in message

    body = {"chat_template_kwargs": {"enable_thinking": False}}
    text = '[{"name": "get_time", "parameters": {}}]'
    [choice] = chat(reasoning_server, text, tool_choice="required", extra_body=body).choices
    assert choice.message.tool_calls[0].function.name == "get_time"


def test_unknown_parser_names_are_rejected_at_startup(server: ScriptedServer) -> None:
    with pytest.raises(ConfigError, match="hermes, llama3_json"):
        AnswerFormat(tool_call_parser="hermse")
    with pytest.raises(ConfigError, match="deepseek_r1, qwen3"):
        AnswerFormat(reasoning_parser="other")


def test_auto_tool_choice_is_checked_at_startup(server: ScriptedServer, tmp_path: Path) -> None:
    must = AnswerFormat(enable_auto_tool_choice=True)
    unclear = load_tokenizer(make_byte_tokenizer(tmp_path / "model", "{{ tools }}"))

    must.check(server.client.tokenizer)
    with pytest.raises(ConfigError, match="set it with --tool-call-parser"):
        must.check(unclear)
    AnswerFormat(enable_auto_tool_choice=True, tool_call_parser="hermes").check(unclear)


def test_markers_that_are_special_tokens_are_kept_in_the_text(
    server: ScriptedServer, tmp_path: Path
) -> None:
    chat(server, "")
    assert server.client.asked[-1][1].skip_special_tokens

    folder = make_byte_tokenizer(tmp_path / "model", TEMPLATE)
    form = AnswerFormat(tool_call_parser="mistral")
    with scripted_server(folder, answer_format=form) as mistral:
        [choice] = chat(mistral, "[TOOL_CALLS]get_time{}").choices

    assert not mistral.client.asked[-1][1].skip_special_tokens
    [call] = choice.message.tool_calls
    assert call.function.name == "get_time" and len(call.id) == 9
