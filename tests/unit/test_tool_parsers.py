"""Tool call parsers: what each format reads, and the rules that all of them follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portalm.errors import ConfigError
from portalm.text.char_parser import CallArguments, CallBegin, Content, Piece
from portalm.text.tool_parsers import TOOL_PARSERS, detect_format
from portalm.text.tool_parsers.base import ToolParser
from portalm.text.tool_parsers.forced import NamedCallParser, RequiredCallsParser

TOOLS = ("get_weather", "get_time")
PARIS = '{"city":"Paris"}'
LONG = json.dumps({"text": 'a "quoted" \\ </tool_call> [TOOL_CALLS] é\n', "n": [1, -2.5e3, None]})
LONG_COMPACT = json.dumps(json.loads(LONG), separators=(",", ":"))

CASES = {  # format: {name: (text, content, [(function, arguments)])}
    "hermes": {
        "no call": ("Hello,  <b>world</b> \n", "Hello,  <b>world</b> \n", []),
        "one call": (
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "",
            [("get_weather", PARIS)],
        ),
        "content around": (
            'Let me look.\n\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call> \nDone. ',
            "Let me look.Done. ",
            [("get_time", "{}")],
        ),
        "two calls": (
            '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>\n'
            '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
            "",
            [("get_time", "{}"), ("get_weather", PARIS)],
        ),
        "hard arguments": (
            f'<tool_call>{{"name": "get_time", "arguments": {LONG}}}</tool_call>',
            "",
            [("get_time", LONG_COMPACT)],
        ),
        "arguments as JSON text, id": (
            '<tool_call>{"id": 7, "name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'
            "</tool_call>",
            "",
            [("get_weather", PARIS)],
        ),
        "no arguments": ('<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
        "missing brace": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>!',
            "!",
            [("get_weather", PARIS)],
        ),
        "extra brace": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}}\n</tool_call>!',
            "!",
            [("get_weather", PARIS)],
        ),
        "no end": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}',
            "",
            [("get_weather", PARIS)],
        ),
        "cut": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
            "",
            [("get_weather", '{"city":"Pa')],
        ),
        "broken arguments": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": tru, 5}}</tool_call> Hm.',
            "Hm.",
            [("get_weather", '{"city":tru, 5}}')],
        ),
        "malformed": (
            "<tool_call>get_weather</tool_call>",
            "<tool_call>get_weather",
            [],
        ),
        "cut before the name": ('<tool_call>{"name": "get_w', '<tool_call>{"name": "get_w', []),
        "no name": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}', []),
        "arguments not an object": (
            '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "get_time", "arguments": [1]}',
            [],
        ),
        "a call after a malformed one": (
            '<tool_call>{<tool_call>{"name": "get_time", "arguments": {}}</tool_call>',
            "<tool_call>{",
            [("get_time", "{}")],
        ),
        "incomplete tags": ("a <tool_cal> b <tool_", "a <tool_cal> b <tool_", []),
    },
    "llama3_json": {
        "no call": (" Hello {} ", " Hello {} ", []),
        "one call": (
            '\n{"name": "get_weather", "parameters": {"city": "Paris"}}',
            "",
            [("get_weather", PARIS)],
        ),
        "tagged, typed, two": (
            '<|python_tag|>{"type": "function", "name": "get_time", "parameters": {}}; '
            '{"name": "get_weather", "parameters": {"city": "Paris"}}',
            "",
            [("get_time", "{}"), ("get_weather", PARIS)],
        ),
        "JSON that is not a call": (
            '{"name": "Bob", "parameters": {}}',
            '{"name": "Bob", "parameters": {}}',
            [],
        ),
        "other JSON": ('{"answer": 42}', '{"answer": 42}', []),
        "content after": (
            '{"name": "get_time", "parameters": {}} ; {"a": 1}',
            '; {"a": 1}',
            [("get_time", "{}")],
        ),
        "cut": ('{"name": "get_time", "parameters": {"z"', "", [("get_time", '{"z"')]),
        "deep": ('{"name": "get_time", "parameters": ' + '{"a":' * 70, "", [("get_time", None)]),
    },
    "mistral": {
        "no call": ("[TOOL_CALL] [1]", "[TOOL_CALL] [1]", []),
        "a list": (
            '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}, '
            '{"name": "get_weather", "arguments": {"city": "Paris"}}]',
            "",
            [("get_time", "{}"), ("get_weather", PARIS)],
        ),
        "named": (
            'Hm. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time{}',
            "Hm.",
            [("get_weather", PARIS), ("get_time", "{}")],
        ),
        "named with ids": (
            '[TOOL_CALLS]get_weather[CALL_ID]abcdefgh1[ARGS]{"city": "Paris"}',
            "",
            [("get_weather", PARIS)],
        ),
        "malformed": ("[TOOL_CALLS]get weather", "[TOOL_CALLS]get weather", []),
        "malformed list": ("[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
        "malformed second": (
            '[TOOL_CALLS][{"name": "get_time", "arguments": {}}, 1]',
            ", 1]",
            [("get_time", "{}")],
        ),
        "cut": ('[TOOL_CALLS]get_time{"a": "', "", [("get_time", '{"a":"')]),
        "nothing": ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    },
    "pythonic": {
        "no call": ("[1, 2] and (3)", "[1, 2] and (3)", []),
        "one call": ('[get_weather(city="Paris")]', "", [("get_weather", PARIS)]),
        "two, tagged": (
            "<|python_start|>[get_time(), get_weather(city='Paris',)]<|python_end|>",
            "",
            [("get_time", "{}"), ("get_weather", PARIS)],
        ),
        "hard arguments": (
            "[get_time(a=[1, (2.5)], b={'x': None, 'y': true}, c=') \\' é', d=-1)]",
            "",
            [("get_time", '{"a":[1,2.5],"b":{"x":null,"y":true},"c":") \' é","d":-1}')],
        ),
        "unknown function": ("[print(1)]", "[print(1)]", []),
        "no keywords": ('[get_weather("Paris")]', '[get_weather("Paris")]', []),
        "code instead of a value": ("[get_time(a=f(1))]", "[get_time(a=f(1))]", []),
        "number out of range": ("[get_time(a=1e999)]", "[get_time(a=1e999)]", []),
        "lone surrogate": ("[get_time(a='\\ud800')]", "[get_time(a='\\ud800')]", []),
        "malformed second": (
            "[get_time(), get_time(] ok",
            ", get_time(] ok",
            [("get_time", "{}")],
        ),
        "cut": ("[get_weather(city='Pa", "[get_weather(city='Pa", []),
        "deep": ("[get_time(a=" + "[" * 100, "[get_time(a=" + "[" * 100, []),
    },
    "named": {
        "arguments": (' {"city": "Paris"}', "", [("get_weather", PARIS)]),
        "cut": ('{"city": "P', "", [("get_weather", '{"city":"P')]),
        "something else": ("Paris", "Paris", []),
    },
    "required": {
        "calls": (
            '[{"name": "get_time", "parameters": {}}, {"name": "get_weather", '
            '"parameters": {"city": "Paris"}}]',
            "",
            [("get_time", "{}"), ("get_weather", PARIS)],
        ),
        "cut": ('[{"name": "get_time", "parameters": {"a', "", [("get_time", '{"a')]),
        "cut before the name": ('[{"name": "get', '[{"name": "get', []),
    },
}
ALL = [(kind, name) for kind, cases in CASES.items() for name in cases]


def make(kind: str) -> ToolParser:
    if kind == "named":
        return NamedCallParser(["get_weather"])
    if kind == "required":
        return RequiredCallsParser(TOOLS)
    return TOOL_PARSERS.get(kind)(TOOLS)


def summed(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallBegin):
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


def read(kind: str, *texts: str) -> tuple[str, list[tuple[str, str]]]:
    parser = make(kind)
    pieces = [piece for text in texts for piece in parser.push(text)]
    return summed([*pieces, *parser.finish()])


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{k}: {n}" for k, n in ALL])
def test_text_is_split_into_content_and_calls(kind: str, name: str) -> None:
    text, content, calls = CASES[kind][name]

    found_content, found_calls = read(kind, text)

    assert found_content == content
    assert [n for n, _ in found_calls] == [n for n, _ in calls]
    for (_, found), (_, wanted) in zip(found_calls, calls, strict=True):
        assert wanted is None or found == wanted


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{k}: {n}" for k, n in ALL])
def test_pieces_of_any_split_add_up_to_the_whole(kind: str, name: str) -> None:
    text = CASES[kind][name][0]
    whole = read(kind, text)

    assert read(kind, *text) == whole
    for i in range(0, len(text), 1 + len(text) // 40):
        assert read(kind, text[:i], text[i:]) == whole


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "[", "]",
    '{"name": "get_time", "arguments": {', '"name"', '"arguments"', "get_time", "(", ")", ":", ",",
    '"', "'", "\\", "a=1", " ", "\n", "é", "5", "null", ";", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30))
def test_random_text_parses_the_same_in_any_split(kind: str, fragments: list[str]) -> None:
    text = "".join(fragments)

    whole = read(kind, text)

    assert read(kind, *fragments) == whole
    assert read(kind, *text) == whole
    if not whole[1]:  # no call: everything is content, except unmatched closing tags
        assert whole[0].split() == text.replace("</tool_call>" * (kind == "hermes"), "").split()


def test_arguments_stream_while_they_are_generated() -> None:
    parser = make("hermes")

    begun = parser.push('<tool_call>{"name": "get_weather", "arguments": {"ci')
    more = parser.push('ty": "Par')

    assert begun == [CallBegin("get_weather"), CallArguments('{"ci')]
    assert more == [CallArguments('ty":"Par')]


def test_content_is_not_held_back() -> None:
    assert make("hermes").push("Hello <t") == [Content("Hello")]
    assert make("llama3_json").push('{"answer"') == []
    assert make("llama3_json").push('{"answer":') == [Content('{"answer":')]


TEMPLATES = {  # excerpts of the models' own templates
    "hermes": 'return a json object within <tool_call></tool_call> tags:\n<tool_call>\n{"name":',
    "llama3_json": 'Respond in the format {"name": function name, "parameters": dictionary of',
    "mistral": "{{- '[TOOL_CALLS] [' }}",
    "pythonic": "in the format of [func_name1(params_name1=params_value1, params_name2=...)]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_format_is_detected_from_the_chat_template(name: str) -> None:
    assert detect_format("{{ tools }}" + TEMPLATES[name]) == name


@pytest.mark.parametrize(
    "template",
    [
        "",
        "<tool_call>\n<function=name>\n</function>\n</tool_call>",
        TEMPLATES["mistral"] + TEMPLATES["hermes"],
    ],
    ids=["none", "unknown", "two"],
)
def test_no_format_is_detected_from_an_ambiguous_template(template: str) -> None:
    assert detect_format("{{ tools }}" + template) is None


def test_template_without_tools_uses_the_hermes_format() -> None:
    assert detect_format("{{ messages }}") == "hermes"


def test_mistral_call_ids_are_nine_alphanumeric_characters() -> None:
    assert len(TOOL_PARSERS.get("mistral").new_call_id()) == 9
    assert TOOL_PARSERS.get("mistral").new_call_id().isalnum()


def test_another_package_can_add_a_format(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "shouting.py").write_text(
        "from portalm.text.tool_parsers.base import ToolParser\n"
        "class Shouting(ToolParser):\n"
        "    def _run(self):\n"
        "        yield from self._content_until()\n"
    )
    info = tmp_path / "shouting-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[portalm.tool_parsers]\nshouting = shouting:Shouting\nbroken = nowhere:Nothing\n"
        "wrong = json:JSONDecoder\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    assert TOOL_PARSERS.get("shouting").parse("hi", TOOLS) == [Content("hi")]
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        TOOL_PARSERS.get("broken")
    with pytest.raises(ConfigError, match="is not a subclass of"):
        TOOL_PARSERS.get("wrong")


def test_error_for_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="hermes, llama3_json, mistral, pythonic"):
        TOOL_PARSERS.get("other")
