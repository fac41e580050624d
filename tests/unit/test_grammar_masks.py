"""Grammars and their token masks, compared with plain checks."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import regex

from portalm.core.request import Request
from portalm.errors import InvalidRequest
from portalm.runner.sampled_rows import SampledRow
from portalm.runner.token_masks import TokenMasks
from portalm.sampling_params import SamplingParams, StructuredOutputs
from portalm.structured.compiler import GrammarCompiler
from portalm.structured.grammar import Grammar, Grammars
from portalm.structured.messages import LoadGrammar, Vocabulary

EOS = 2
TOKENS = [b"", b"", b"", *(bytes([i]) for i in range(256)), b"true", b"12", b'":', b"ab", b"yes"]
SIZE = 300  # columns of the logits: more than there are tokens, and not a multiple of 32
VOCABULARY = Vocabulary(msgspec.msgpack.encode(TOKENS), SIZE, [EOS])

AMBIGUOUS = "(?:.*.*.*){1,50}x"
EXPLOSIVE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(lambda: VOCABULARY, compile_s=2.0)
    for both in [compiler.compile(StructuredOutputs(regex=text)) for text in "ab"]:
        both.result()  # both processes have started
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars()
    yield grammars
    grammars.close()


@pytest.fixture
def load(compiler: GrammarCompiler, grammars: Grammars):
    def load(**asked: object) -> Grammar:
        compiled = compiler.compile(StructuredOutputs(**asked)).result()  # type: ignore[arg-type]
        grammars.load(
            LoadGrammar(key=compiled.key, data=compiled.data, vocabulary=VOCABULARY, forget=[])
        )
        return grammars[compiled.key]

    return load


def allowed(masks: TokenMasks, request: Request) -> set[int]:
    row = SampledRow(index=0, request=request, position=request.num_tokens, target=-1)
    mask = masks.build([row], 1)
    assert mask is not None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    found = set(np.flatnonzero(bits).tolist())
    assert bool(found) == (row.refusal is None)
    return found


def make(grammar: Grammar, request_id: str = "r", **params: object) -> Request:
    return Request(
        request_id, [7, 8], SamplingParams(**params), seed=0, max_total_tokens=999,
        eos_token_ids=[EOS], grammar=grammar,
    )  # fmt: skip


def sample_answer(grammar: Grammar, seed: int, max_tokens: int = 400) -> str | None:
    """Sample random allowed tokens until the end; None if it is not reached."""
    masks, request, rng = TokenMasks(SIZE), make(grammar), random.Random(seed)
    for _ in range(max_tokens):
        # XGrammar allows a few byte sequences that are not characters
        choices = [i for i in sorted(allowed(masks, request)) if i == EOS or TOKENS[i].isascii()]
        token = EOS if EOS in choices and rng.random() < 0.3 else rng.choice(choices)
        if token == EOS:
            return b"".join(TOKENS[i] for i in request.output_token_ids).decode()
        request.token_ids.append(token)
    return None


REGEXES = [r"\d{3}-\d{4}", r"(yes|no|true)+x?", r"a{2,5}b*[^a-z\u0080-\uffff]", r"(ab|a)*12"]


@pytest.mark.parametrize("pattern", REGEXES)
def test_exactly_the_tokens_that_can_follow_in_a_regex_are_allowed(load, pattern: str) -> None:
    grammar, rng = load(regex=pattern), random.Random(0)
    ascii_ids = [i for i, t in enumerate(TOKENS) if t and t.isascii()]
    for seed in range(4):
        masks, request, text = TokenMasks(SIZE), make(grammar, str(seed)), ""
        for _ in range(12):
            found = allowed(masks, request)

            follow = {
                i
                for i in ascii_ids
                if regex.fullmatch(pattern, text + TOKENS[i].decode(), partial=True)
            }
            assert found & set(ascii_ids) == follow
            assert (EOS in found) == (regex.fullmatch(pattern, text) is not None)
            if not follow:
                break
            token = rng.choice(sorted(follow))
            request.token_ids.append(token)
            text += TOKENS[token].decode()


def test_answers_with_a_schema_are_json_that_matches_it(load) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 4},
            "age": {"type": "integer", "minimum": 3, "maximum": 17},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
    }
    grammar = load(json=schema)
    answers = [sample_answer(grammar, seed) for seed in range(10)]

    assert None not in answers
    for answer in map(json.loads, filter(None, answers)):
        assert list(answer) == ["name", "age", "tags"]
        assert 1 <= len(answer["name"]) <= 4
        assert 3 <= answer["age"] <= 17
        assert len(answer["tags"]) <= 2 and set(answer["tags"]) <= {"a", "b"}


def test_a_choice_may_contain_any_character(load) -> None:
    texts = ["yes", 'a"\\\n\x01 é', "日本 😀", "yes sir", "a]b[-^"]
    grammar = load(choice=texts)

    for text in texts:
        request = make(grammar, text)
        request.token_ids += [3 + byte for byte in text.encode()]
        assert EOS in allowed(TokenMasks(SIZE), request)


def test_a_grammar_in_gbnf(load) -> None:
    grammar = load(grammar='root ::= sum\nsum ::= "1" | "1+" sum')

    answer = sample_answer(grammar, 3)

    assert answer is not None and regex.fullmatch(r"1(\+1)*", answer)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(None, '{"a": 1, "b": 2}'), ("", '{"a":1,"b":2}'), (r"[ \n\r\t]{0,2}", '{ \n"a":1,"b" : 2}')],
)
def test_whitespace_is_as_requested(load, pattern: str | None, text: str) -> None:
    schema = {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    grammar = load(json=schema, whitespace_pattern=pattern)
    request = make(grammar)
    request.token_ids += [3 + byte for byte in text.encode()]

    assert allowed(TokenMasks(SIZE), request) == {EOS}


# -- other parameters -------------------------------------------------------------------------


def test_a_finished_grammar_ends_the_answer_despite_other_parameters(load) -> None:
    request = make(
        load(choice=["a"]), ignore_eos=True, min_tokens=5, allowed_token_ids=[3 + ord("a")]
    )
    masks = TokenMasks(SIZE)

    assert allowed(masks, request) == {3 + ord("a")}
    request.token_ids.append(3 + ord("a"))
    assert allowed(masks, request) == {EOS}


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 5}], ids=str)
def test_a_grammar_that_can_continue_does_where_the_end_is_forbidden(load, params) -> None:
    request = make(load(regex="1*"), **params)

    assert EOS not in allowed(TokenMasks(SIZE), request)
    assert EOS in allowed(TokenMasks(SIZE), make(load(regex="1*")))


def test_a_row_without_an_allowed_token_is_refused(load) -> None:
    request = make(load(regex="a+"), allowed_token_ids=[3 + ord("b")])
    row = SampledRow(index=0, request=request, position=2, target=-1)

    TokenMasks(SIZE).build([row], 1)

    assert row.refusal is not None and "allowed_token_ids" in row.refusal


def test_a_row_whose_tokens_do_not_match_the_grammar_is_refused(load) -> None:
    request = make(load(regex="a+"))
    request.token_ids.append(3 + ord("b"))
    row = SampledRow(index=0, request=request, position=3, target=-1)

    TokenMasks(SIZE).build([row], 1)

    assert row.refusal is not None and "does not match" in row.refusal


def test_a_request_whose_masks_take_too_long_is_refused(load, monkeypatch) -> None:
    request, masks = make(load(regex="a+")), TokenMasks(SIZE)
    allowed(masks, request)
    monkeypatch.setattr("portalm.structured.grammar._ONCE_S", -1.0)
    row = SampledRow(index=0, request=request, position=2, target=-1)

    masks.build([row], 1)

    assert row.refusal is not None and "too ambiguous" in row.refusal


def test_a_new_matcher_reaches_the_same_state(load) -> None:
    masks, request = TokenMasks(SIZE), make(load(regex=r"\d{3}-\d{4}"))
    for char in "12":
        request.token_ids.append(3 + ord(char))
        kept = allowed(masks, request)
    masks.forget(["r"])

    assert allowed(masks, request) == kept == {3 + ord(d) for d in "0123456789"}


# -- compiling --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"regex": "(a"}, "parenthesis is not closed"),
        ({"regex": "a(?=b)"}, "Lookahead is not supported"),
        ({"regex": "a^b"}, "is ignored"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "Nest layer"),
        ({"grammar": "root ::= missing"}, '"missing" is not defined'),
        ({"grammar": "root ::= root"}, "matches no text"),
        ({"regex": AMBIGUOUS}, "too ambiguous"),
        ({"json": {"type": "number", "multipleOf": 0.5}}, "multipleOf is not supported"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "allOf"),
        ({"json_object": True, "whitespace_pattern": "[ ]?"}, "whitespace_pattern"),
    ],
    ids=str,
)
def test_what_xgrammar_does_not_support_is_refused_by_name(compiler, asked, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        compiler.compile(StructuredOutputs(**asked)).result()

    assert caught.value.param == "structured_outputs"
    assert "cpp" not in str(caught.value)


def test_compiling_an_explosive_grammar_times_out_while_others_are_compiled(compiler) -> None:
    explosive = compiler.compile(StructuredOutputs(json=EXPLOSIVE))
    for i in range(5):
        assert compiler.compile(StructuredOutputs(regex=f"a{{{i}}}b")).result()
    assert not explosive.done()

    with pytest.raises(InvalidRequest, match="more than 2 s"):
        explosive.result()

    started = time.monotonic()
    with pytest.raises(InvalidRequest, match="more than 2 s"):
        compiler.compile(StructuredOutputs(json=EXPLOSIVE))
    assert time.monotonic() - started < 2  # the refusal is cached: compiling takes 2 s


def test_a_compiler_that_crashes_fails_only_its_grammar(compiler) -> None:
    compiler.compile(StructuredOutputs(regex="one")).result()
    compiler._idle[-1]._process.kill()  # the next one to be used

    with pytest.raises(InvalidRequest, match="memory"):
        compiler.compile(StructuredOutputs(regex="two")).result()
    assert compiler.compile(StructuredOutputs(regex="three")).result()


def test_the_same_grammar_is_compiled_once(compiler) -> None:
    first = compiler.compile(StructuredOutputs(regex="once")).result()

    assert compiler.compile(StructuredOutputs(regex="once")).result() is first
