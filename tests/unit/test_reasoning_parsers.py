"""Reasoning parsers, and whole answers with reasoning, content and calls."""

from __future__ import annotations

import pytest

from portalm.text.answer import AnswerParser, CallDelta
from portalm.text.char_parser import Content, Reasoning
from portalm.text.reasoning_parsers import REASONING_PARSERS
from portalm.text.tool_parsers.hermes import HermesToolParser

OPEN = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
CASES = [  # parser, end of the prompt, text, reasoning, content
    ("deepseek_r1", "", "<think>\nHm,\nso.\n</think>\n\nYes. ", "Hm,\nso.", "Yes. "),
    ("deepseek_r1", OPEN, "Hm.</think>Yes.", "Hm.", "Yes."),
    ("deepseek_r1", "", "Hm.\n</think>Yes.", "Hm.", "Yes."),
    ("deepseek_r1", OPEN, "Hm. < </thin", "Hm. < </thin", ""),
    ("deepseek_r1", CLOSED, " Yes. ", "", " Yes. "),
    ("qwen3", "", "\n<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", OPEN, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", CLOSED, "Yes. ", "", "Yes. "),
    ("qwen3", "", " Yes <think>", "", " Yes <think>"),
    ("qwen3", "", "<think></think>", "", ""),
    ("qwen3", "", "<think>Hm. </think", "Hm. </think", ""),
]


@pytest.mark.parametrize(("name", "answer_start", "text", "reasoning", "content"), CASES)
def test_reasoning_is_separated_from_content(name, answer_start, text, reasoning, content) -> None:
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(len(text)))):
        parser = REASONING_PARSERS.get(name)(answer_start)
        pieces = [piece for one in texts for piece in parser.push(one)] + parser.finish()

        found = "".join(p.text for p in pieces if isinstance(p, Reasoning))
        assert found == reasoning
        assert "".join(p.text for p in pieces if isinstance(p, Content)) == content


def test_calls_are_read_only_after_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    text = f"<think>I could {call}.</think>\n\nLet me see.\n{call}{call}"
    for texts in ([text], list(text)):
        reasoning = REASONING_PARSERS.get("qwen3")("")
        answer = AnswerParser(reasoning=reasoning, tools=HermesToolParser(["f"]))
        pieces = [piece for one in texts for piece in answer.push(one)] + answer.finish()

        assert answer.reasoning == f"I could {call}."
        assert answer.content == "Let me see."
        assert [(c.name, c.arguments) for c in answer.calls] == [("f", '{"a":1}')] * 2
        deltas = [piece for piece in pieces if isinstance(piece, CallDelta)]
        assert [d.index for d in deltas if d.new_call is not None] == [0, 1]
        assert "".join(d.arguments for d in deltas if d.index == 1) == '{"a":1}'
        assert answer.calls[0].id != answer.calls[1].id


def test_calls_beyond_max_calls_are_dropped() -> None:
    answer = AnswerParser(tools=HermesToolParser(["f"]), max_calls=1)
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    answer.push(call + call)
    answer.finish()

    assert [c.arguments for c in answer.calls] == ['{"a":1}']
