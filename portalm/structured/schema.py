"""Prepare JSON schemas for XGrammar: reject or rewrite what it would ignore.

XGrammar warns about some keywords that it cannot express and silently ignores others. An answer
must match the whole schema, so each assertion keyword of JSON Schema (2020-12, and earlier drafts
where they agree) is either known to be enforced or rejected by name. Keywords that assert nothing
(title, default, and names that are not in the standard) are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from portalm.errors import InvalidRequest

MAX_DEPTH = 64
"""Maximum nesting depth of schemas."""

_NEVER = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
    "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems",
    "unevaluatedProperties", "additionalItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Assertions that XGrammar does not enforce."""

_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties",
    ),
}  # fmt: skip
"""Assertions that XGrammar enforces, by the type that they apply to."""

_CHOOSERS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""If a schema has one of these, XGrammar ignores its other keywords."""

_ASSERTIONS = frozenset(("type", *_CHOOSERS, *(k for names in _OF_TYPE.values() for k in names)))

_FORMATS = frozenset((
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri",
    "uri-reference", "uri-template", "json-pointer", "relative-json-pointer",
))  # fmt: skip

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,),
    "null": (type(None),), "array": (list,), "object": (dict,),
}  # fmt: skip


def prepare_schema(text: str) -> str:
    """Convert a JSON schema to an equivalent one that XGrammar enforces completely.

    Args:
        text: the schema as JSON text.

    Returns:
        The converted schema as JSON text.

    Raises:
        InvalidRequest: `text` is not a JSON schema, or has assertions that XGrammar ignores.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(
            f"the JSON schema is not JSON: {error or 'it is nested too deeply'}"
        ) from None
    if not isinstance(schema, dict):
        raise _refused("a JSON schema must be an object")
    return json.dumps(_Preparer(schema).root(), ensure_ascii=False)


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(problem, param="structured_outputs")


class _Preparer:
    """Converter of one schema; definitions that are never referenced are not checked."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._named: dict[str, Any] = {}
        """Converted schemas by `$ref`; None while the conversion is in progress."""

    def root(self) -> dict[str, Any]:
        """Convert the whole schema."""
        prepared = self._schema(self._root, "#", 0)
        assert isinstance(prepared, dict)
        for ref, value in self._named.items():
            _put(prepared, ref.removeprefix("#/").split("/"), value)
        return prepared

    def _schema(self, schema: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _refused(f"the JSON schema is nested more than {MAX_DEPTH} levels deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self._refuse(place, f"must be a schema, not {type(schema).__name__}")
        for name in _NEVER:
            if schema.get(name, False) is not False:
                self._refuse(place, f"has {name!r}, which is not supported")
        choosers = [name for name in _CHOOSERS if name in schema]
        if choosers:
            return self._chooser(schema, choosers[0], place, depth)
        kinds = self._kinds(schema, place)
        prepared = dict(schema)
        if "object" in kinds:
            self._object(prepared, place, depth)
        if "array" in kinds:
            self._array(prepared, place, depth)
        if "string" in kinds:
            self._string(prepared, place)
        return prepared

    # -- references, constants and unions -------------------------------------------------------

    def _chooser(self, schema: dict[str, Any], name: str, place: str, depth: int) -> dict[str, Any]:
        others = sorted((_ASSERTIONS & schema.keys()) - {name})
        if name in ("const", "enum") and others == ["type"]:
            self._check_values(schema, place)
            others = []
        if others:
            self._refuse(
                place,
                f"combines {name!r} with {', '.join(map(repr, others))}, which would be ignored; "
                f"merge them into one schema",
            )
        prepared = {key: value for key, value in schema.items() if key != "type"}
        if name == "$ref":
            self._ref(schema["$ref"], place, depth)
        elif name in ("anyOf", "oneOf", "allOf"):
            options = schema[name]
            if not isinstance(options, list) or not options:
                self._refuse(place, f"{name!r} must be a list of schemas")
            prepared[name] = [
                self._schema(option, f"{place}/{name}/{i}", depth + 1)
                for i, option in enumerate(options)
            ]
            if name == "oneOf" and self._are_disjoint(options):
                prepared["anyOf"] = prepared.pop("oneOf")  # equivalent, as at most one can match
        return prepared

    def _check_values(self, schema: Mapping[str, Any], place: str) -> None:
        kinds = self._kinds(schema, place)
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        for value in values if isinstance(values, list) else []:
            if not any(_is_of_type(value, kind) for kind in kinds):
                self._refuse(
                    place, f"allows {json.dumps(value)}, which is not of type {schema['type']!r}"
                )

    def _ref(self, ref: Any, place: str, depth: int) -> None:
        if ref == "#":
            return
        if not isinstance(ref, str) or not ref.startswith("#/"):
            self._refuse(
                place, f"refers to {ref!r}; only references inside the schema are supported"
            )
        if ref not in self._named:
            self._named[ref] = None  # a schema may refer to itself
            self._named[ref] = self._schema(self._find(ref, place), ref, depth + 1)

    def _find(self, ref: str, place: str) -> Any:
        found: Any = self._root
        for part in ref.removeprefix("#/").split("/"):
            if not isinstance(found, dict) or part not in found:
                self._refuse(place, f"refers to {ref!r}, which does not exist")
            found = found[part]
        return found

    def _are_disjoint(self, options: list[Any]) -> bool:
        """Whether no value can match two options: their types or a property's values differ."""
        plain = [self._resolved(option) for option in options]
        if not all(isinstance(option, dict) for option in plain):
            return False
        kinds = [option.get("type") for option in plain]
        if all(isinstance(kind, str) for kind in kinds):
            if len({"number" if kind == "integer" else kind for kind in kinds}) == len(kinds):
                return True
            if set(kinds) == {"object"}:
                names = set.intersection(*(set(option.get("required") or ()) for option in plain))
                return any(self._is_discriminator(name, plain) for name in names)
        return False

    def _is_discriminator(self, name: str, options: list[Any]) -> bool:
        """Whether the property's allowed values differ between all options."""
        seen: set[str] = set()
        for option in options:
            value = self._resolved((option.get("properties") or {}).get(name))
            if not isinstance(value, dict) or not ("const" in value or "enum" in value):
                return False
            values = {json.dumps(v) for v in value.get("enum", [value.get("const")])}
            if values & seen:
                return False
            seen |= values
        return True

    def _resolved(self, schema: Any) -> Any:
        if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
            return self._find(schema["$ref"], "#")
        return schema

    # -- schemas with a type --------------------------------------------------------------------

    def _kinds(self, schema: Mapping[str, Any], place: str) -> list[str]:
        """The types that a schema allows; empty if it allows any value."""
        kinds = schema.get("type")
        if kinds is None:
            implied = [kind for kind, names in _OF_TYPE.items() if schema.keys() & set(names)]
            if implied not in ([], ["object"], ["array"]):
                self._refuse(
                    place, f"needs a 'type': it has keywords for {' and '.join(implied)} values"
                )
            if implied and not schema.keys() & {"properties", "additionalProperties", "items",
                                                "prefixItems"}:  # fmt: skip
                self._refuse(place, f'needs a \'type\': add "type": "{implied[0]}"')
            return implied
        kinds = kinds if isinstance(kinds, list) else [kinds]
        for kind in kinds:
            if kind not in _JSON_TYPES:
                self._refuse(place, f"has type {kind!r}, which is not a JSON type")
        return kinds

    def _object(self, schema: dict[str, Any], place: str, depth: int) -> None:
        for name in ("properties", "patternProperties"):
            inner = schema.get(name)
            if inner is not None:
                if not isinstance(inner, dict):
                    self._refuse(place, f"{name!r} must be an object")
                schema[name] = {
                    key: self._schema(value, f"{place}/{name}/{key}", depth + 1)
                    for key, value in inner.items()
                }
        for name in ("additionalProperties", "propertyNames"):
            if name in schema:
                inner = schema[name]
                if name == "propertyNames" and isinstance(inner, dict):
                    inner = {"type": "string", **inner}
                schema[name] = self._schema(inner, f"{place}/{name}", depth + 1)
        if not schema.keys() & {"properties", "patternProperties", "additionalProperties"}:
            schema["additionalProperties"] = True  # no property is named: allow any
        self._required(schema, place)

    def _required(self, schema: dict[str, Any], place: str) -> None:
        """Add required properties to 'properties': XGrammar ignores those that are not there."""
        required = schema.get("required", [])
        if not isinstance(required, list) or any(not isinstance(name, str) for name in required):
            self._refuse(place, "'required' must be a list of property names")
        missing = [name for name in required if name not in schema.get("properties", {})]
        if not missing:
            return
        if schema.get("additionalProperties") is False or "patternProperties" in schema:
            self._refuse(
                place, f"requires {missing[0]!r}, which is not among its 'properties': add it"
            )
        more = schema.get("additionalProperties", True)
        schema["properties"] = {**schema.get("properties", {}), **dict.fromkeys(missing, more)}

    def _array(self, schema: dict[str, Any], place: str, depth: int) -> None:
        if "prefixItems" in schema:
            if not isinstance(schema["prefixItems"], list):
                self._refuse(place, "'prefixItems' must be a list of schemas")
            schema["prefixItems"] = [
                self._schema(item, f"{place}/prefixItems/{i}", depth + 1)
                for i, item in enumerate(schema["prefixItems"])
            ]
        schema["items"] = self._schema(
            schema.get("items", "prefixItems" not in schema), f"{place}/items", depth + 1
        )

    def _string(self, schema: dict[str, Any], place: str) -> None:
        given = [name for name in _OF_TYPE["string"] if name in schema]
        if not given:
            return
        if "format" in given and schema["format"] not in _FORMATS:
            self._refuse(
                place,
                f"has format {schema['format']!r}, which is not supported; supported: "
                f"{', '.join(sorted(_FORMATS))}",
            )
        if len(given) > 1 and given != ["minLength", "maxLength"]:
            self._refuse(
                place, f"has {' and '.join(map(repr, given))}; only one of them is supported"
            )
        if "Length" in given[0]:
            low, high = schema.pop("minLength", 0), schema.pop("maxLength", None)
            for value in (low, high or 0):
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    self._refuse(place, "'minLength' and 'maxLength' must be non-negative integers")
            # a pattern, because with XGrammar's own lengths raw control characters are allowed
            schema["pattern"] = f"^.{{{low},{'' if high is None else high}}}$"

    def _refuse(self, place: str, problem: str) -> NoReturn:
        raise _refused(f"the JSON schema at {place} {problem}")


def _is_of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _JSON_TYPES[kind])


def _put(schema: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at `path`; containers along the path are copied, not modified."""
    inner = schema
    for part in path[:-1]:
        inner[part] = dict(inner.get(part) or {})
        inner = inner[part]
    inner[path[-1]] = value
