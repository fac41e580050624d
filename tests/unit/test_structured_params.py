"""Parameters of structured outputs, and the JSON schemas that are supported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from portalm.core.request import Request
from portalm.errors import InvalidRequest
from portalm.sampling_params import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    SamplingParams,
    StructuredOutputs,
)
from portalm.structured.schema import MAX_DEPTH, prepare_schema


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "got regex and json_object"),
        ({"choice": ()}, "1 to"),
        ({"choice": ("a", "")}, "non-empty"),
        ({"choice": ["x"] * (MAX_CHOICES + 1)}, "1 to"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "bytes, more than the limit"),
        ({"choice": ["a" * MAX_GRAMMAR_BYTES, "b"]}, "bytes, more than the limit"),
        ({"regex": 5}, "must be a string"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"regex": "a", "whitespace_pattern": ""}, "needs json or json_object"),
        ({"json_object": 1}, "true or false"),
        ({"json": {"a": {1}}}, "not a JSON schema"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        StructuredOutputs(**fields)

    assert caught.value.param == "structured_outputs"


def test_a_mapping_is_accepted_and_an_unknown_field_refused() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]})  # type: ignore[arg-type]

    assert params.structured_outputs == StructuredOutputs(choice=("a", "b"))
    with pytest.raises(InvalidRequest, match="no field 'lark'"):
        SamplingParams(structured_outputs={"lark": "x"})  # type: ignore[arg-type]


def test_a_schema_is_stored_as_text_in_property_order() -> None:
    asked = StructuredOutputs(json={"properties": {"b": {}, "a": {}}})

    assert asked.json == '{"properties": {"b": {}, "a": {}}}'


def test_a_grammar_needs_the_history() -> None:
    assert SamplingParams(structured_outputs=StructuredOutputs(regex="a")).needs_history
    request = Request("r", [1], SamplingParams(), seed=0, max_total_tokens=9, grammar=object())
    assert request.needs_history


def test_a_request_with_a_grammar_ends_at_eos_even_with_ignore_eos() -> None:
    params = SamplingParams(ignore_eos=True)
    request = Request(
        "r", [1], params, seed=0, max_total_tokens=9, eos_token_ids=[2], grammar=object()
    )

    assert request.stop_ids == {2}


# -- JSON schemas -----------------------------------------------------------------------------


def prepared(schema: Any) -> Any:
    return json.loads(prepare_schema(schema if isinstance(schema, str) else json.dumps(schema)))


INT: dict[str, Any] = {"type": "integer"}


def nested(depth: int) -> Any:
    schema: Any = INT
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "must be an object"),
        ({"type": "array", "items": INT, "uniqueItems": True}, "'uniqueItems'"),
        ({"not": {}}, "'not'"),
        ({"type": "object", "properties": {"a": {"if": {}}}}, "#/properties/a has 'if'"),
        ({"type": "strin"}, "'strin'"),
        ({"minLength": 3}, "needs a 'type'"),
        ({"required": ["a"]}, "needs a 'type'"),
        ({"type": "string", "format": "phone"}, "format 'phone'"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "only one of them"),
        ({"type": "string", "maxLength": -1}, "non-negative integers"),
        ({"$ref": "#/$defs/A", "minLength": 3, "$defs": {"A": INT}}, "with 'minLength'"),
        ({"$ref": "#/$defs/B", "$defs": {"A": INT}}, "does not exist"),
        ({"$ref": "http://x/y"}, "inside the schema"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "with 'type'"),
        ({"type": "string", "enum": ["a", 1]}, "allows 1"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
        (nested(MAX_DEPTH + 1), "nested more than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unsupported_schema_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named.replace("$", r"\$")):
        prepare_schema(schema if isinstance(schema, str) else json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": INT}, "required": ["a"], "title": "T"},
        {"$ref": "#/$defs/A", "description": "d", "$defs": {"A": INT}},
        {"anyOf": [INT, {"type": "null"}], "default": None},
        {"type": "array", "items": INT, "minItems": 1, "x-unknown": 5},
        nested(MAX_DEPTH),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_supported_schema_is_unchanged(schema: Any) -> None:
    assert prepared(schema) == schema


def test_unused_definitions_are_ignored() -> None:
    assert prepared({**INT, "$defs": {"A": {"not": {}}}})["type"] == "integer"


def test_a_required_property_without_a_schema_may_be_anything() -> None:
    schema = prepared({"type": "object", "properties": {"a": INT}, "required": ["a", "b"]})

    assert schema["properties"] == {"a": INT, "b": True}


def test_an_object_without_listed_properties_may_have_any() -> None:
    assert prepared({"type": "object"})["additionalProperties"] is True


def test_string_lengths_become_a_pattern() -> None:
    assert prepared({"type": "string", "minLength": 2, "maxLength": 5})["pattern"] == "^.{2,5}$"


def test_a_union_with_a_distinguishing_property_becomes_any_of() -> None:
    def kind(name: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"kind": {"const": name}, "n": INT},
            "required": ["kind", "n"],
        }

    union = {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}
    apart = prepared({**union, "$defs": {"A": kind("a"), "B": kind("b")}})
    same = prepared({**union, "$defs": {"A": kind("a"), "B": kind("a")}})

    assert "anyOf" in apart and "oneOf" not in apart
    assert "oneOf" in same
