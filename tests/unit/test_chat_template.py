"""Chat templates: the variables they get, the sandbox, and errors."""

from __future__ import annotations

import pytest

from portalm.errors import InvalidRequest
from portalm.text.chat_template import ChatTemplate, ChatTemplates, Conversation, check_messages

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def render(template: str, messages=(USER,), **options):
    return ChatTemplate(template).render(Conversation(messages=list(messages), **options))


def test_messages_are_rendered_as_text():
    messages = [USER, {"role": "assistant", "content": "ho"}]

    assert render(CHATML, messages) == "<|user|>hi</><|assistant|>ho</><|assistant|>"
    assert render(CHATML, messages, add_generation_prompt=False).endswith("ho</>")


def test_text_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert render(CHATML, [{"role": "user", "content": parts}]).startswith("<|user|>one\ntwo</>")


def test_variables_and_tools_reach_the_template():
    template = "{{ bos_token }}{{ date }}{{ tools[0].function.name }}"
    tools = [{"type": "function", "function": {"name": "look"}}]

    assert render(template, tools=tools, variables={"bos_token": "<s>", "date": 1}) == "<s>1look"


def test_template_can_be_chosen_by_source_or_name():
    templates = ChatTemplates({"default": "d", "tool_use": "t"})

    def choose(template=None, has_tools=False):
        return templates.choose(template, has_tools=has_tools)

    assert (choose(), choose("{{ 1 }}"), choose("tool_use")) == ("d", "{{ 1 }}", "t")
    assert choose(has_tools=True) == "t"


# -- what templates expect --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'a': '<b> & é'} | tojson }}", '{"a": "<b> & é"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("  {% if true %}\nx{% endif %}", "x"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
    ],
)
def test_helpers_that_templates_expect(template, text):
    assert render(template) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template):
    with pytest.raises(InvalidRequest, match="rejected the conversation"):
        render(template)


def test_callers_messages_are_not_modified():
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}

    check_messages([message])

    assert message == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert CALL["function"]["arguments"] == '{"x": 1}'


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.here }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{% if %}", "not valid Jinja, line 1"),
    ],
)
def test_template_error_names_the_reason(template, reason):
    with pytest.raises(InvalidRequest, match=reason):
        render(template)


def test_error_for_a_model_without_a_template_names_the_flag():
    with pytest.raises(InvalidRequest, match="--chat-template"):
        ChatTemplates({}).choose(None, has_tools=False)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must not be empty"),
        ("hi", "must be a list"),
        (USER, "must be a list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role"),
        ([{"role": "", "content": "x"}], "role must be a string"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": 3}], "content must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'.*text parts only"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text"),
        ([{"role": "user", "content": "x", "name": object()}], "JSON values only"),
    ],
)
def test_malformed_messages_are_rejected_naming_their_place(messages, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        render(CHATML, messages) if isinstance(messages, list) else check_messages(messages)

    assert caught.value.param == "messages"


# -- tool calls -------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_tool_call_arguments_become_objects_and_content_is_optional():
    template = "{{ messages[0].tool_calls[0].function.arguments.x }}[{{ messages[0].content }}]"

    assert render(template, [{"role": "assistant", "tool_calls": [CALL]}]) == "1[]"


@pytest.mark.parametrize("call", [{}, {"function": {"name": "f", "arguments": "{"}}, "f"])
def test_malformed_tool_calls_are_rejected(call):
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.tool_calls\[0\]"):
        render(CHATML, [{"role": "assistant", "tool_calls": [call]}])


# -- continuing the final message -------------------------------------------------------------


@pytest.mark.parametrize("content", ["ho", "ho ", "</>", "hi"])
def test_prompt_ends_inside_the_final_message(content):
    messages = [USER, {"role": "assistant", "content": content}]

    text = render(CHATML, messages, add_generation_prompt=False, continue_final_message=True)

    assert text == f"<|user|>hi</><|assistant|>{content}"


def test_prompt_ends_inside_a_final_message_that_the_template_strips():
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [USER, {"role": "assistant", "content": " ho "}]

    text = render(template, messages, add_generation_prompt=False, continue_final_message=True)

    assert text == "[hi][ho"


@pytest.mark.parametrize(
    ("template", "content", "generate", "reason"),
    [
        (CHATML, "ho", True, "exclude each other"),
        (CHATML, "", False, "content to continue"),
        ("{{ messages[0].content }}", "ho", False, "omits or changes"),
    ],
)
def test_final_message_that_cannot_be_continued_is_rejected(template, content, generate, reason):
    messages = [USER, {"role": "assistant", "content": content}]

    with pytest.raises(InvalidRequest, match=reason) as caught:
        render(template, messages, add_generation_prompt=generate, continue_final_message=True)

    assert caught.value.param == "continue_final_message"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_template_without_tools_gets_them_as_text():
    messages = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]

    text = render(CHATML, messages, tools=[TOOL])

    assert text.startswith("<|system|>Be kind.\n\nYou may call functions")
    assert '{"type": "function", "function": {"name": "f"' in text
    assert text.endswith(
        '<|assistant|>Hm.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call></>'
        "<|user|><tool_response>\n42\n</tool_response></><|assistant|>"
    )
    assert render(CHATML, [USER], tools=[TOOL]).startswith("<|system|>You may call functions")


def test_template_with_tools_gets_them_unchanged():
    template = "{{ tools[0].function.name }} {{ messages[0].role }}"

    assert render(template, [{"role": "tool", "content": "42"}], tools=[TOOL]) == "f tool"
