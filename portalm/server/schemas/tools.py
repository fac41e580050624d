"""The tools and tool_choice of a request, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from portalm.errors import InvalidRequest
from portalm.text.tool_parsers.base import FUNCTION_NAME

MAX_TOOLS = 128
"""Maximum number of tools in a request, as in OpenAI's API."""
MAX_TOOL_BYTES = 256 << 10
"""Maximum size of all tool definitions together, as JSON."""
_MAX_CALLS = 32
"""Maximum number of calls in a forced answer: an unbounded list might never end."""
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools that an answer may call; made by `check_tools`."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """As in OpenAI's chat completions: {"type": "function", "function": {...}}."""
    choice: Literal["none", "auto", "required", "named"] = "none"
    named: str | None = None
    """Name of the function to call, if `choice` is "named"."""
    is_parallel: bool = True
    """Whether one answer may have several calls."""

    @property
    def is_forced(self) -> bool:
        """Whether the answer must consist of calls only."""
        return self.choice in ("required", "named")

    @property
    def names(self) -> list[str]:
        """Names of the functions."""
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def max_calls(self) -> int | None:
        """Maximum number of calls in an answer; None: no limit."""
        return None if self.is_parallel else 1

    def forced_schema(self) -> dict[str, Any]:
        """JSON schema of a forced answer.

        For choice "named" the function's arguments; for "required" a list of
        {"name": ..., "parameters": ...} objects.
        """
        schemas = {
            tool["function"]["name"]: tool["function"].get("parameters")
            or {"type": "object", "properties": {}}
            for tool in self.tools
        }
        if self.named is not None:
            return dict(schemas[self.named])
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [name]},
                    "parameters": {"$ref": f"#/$defs/{name}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name in schemas
        ]
        return {
            "$defs": {name: _moved(s, f"#/$defs/{name}") for name, s in schemas.items()},
            "type": "array",
            "minItems": 1,
            "maxItems": _MAX_CALLS if self.is_parallel else 1,
            "items": {"anyOf": calls},
        }


def check_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    *,
    is_parallel: bool | None,
) -> ToolUse:
    """Check the tools and tool_choice of a request.

    Args:
        tools: definitions as in chat completions.
        choice: none, auto, required or {"type": "function", "function": {"name": ...}}; None:
            auto if there are tools.
        is_parallel: `parallel_tool_calls`; None: true.

    Raises:
        InvalidRequest: a definition or the choice is malformed; the text names it.
    """
    if tools is not None and len(tools) > MAX_TOOLS:
        _refuse("tools", f"has {len(tools)} tools; the limit is {MAX_TOOLS}")
    checked = tuple(_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in checked]
    for name in names:
        if names.count(name) > 1:
            _refuse("tools", f"has two functions named {name!r}")
    num_bytes = len(json.dumps(checked).encode())
    if num_bytes > MAX_TOOL_BYTES:
        _refuse("tools", f"has {num_bytes} bytes as JSON; the limit is {MAX_TOOL_BYTES}")
    kind, named = _check_choice(choice, names)
    return ToolUse(
        tools=checked if kind != "none" else (),
        choice=kind,
        named=named,
        is_parallel=is_parallel is not False,
    )


def _check_tool(tool: Any, place: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind != "function":
        _refuse(place, f"must be of type 'function', not {kind!r}: no other type is supported")
    for name in tool.keys() - {"type", "function"}:
        _refuse(f"{place}.{name}", "is an unknown field")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{place}.function", "must be an object with name, description and parameters")
    for name in function.keys() - _FUNCTION_FIELDS:
        _refuse(f"{place}.function.{name}", "is an unknown field")
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        _refuse(
            f"{place}.function.name",
            f"must be 1 to 64 letters, digits, dots, dashes and underscores, not {name!r}",
        )
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        _refuse(f"{place}.function.description", "must be a string")
    if parameters is not None and not _is_object_schema(parameters):
        _refuse(f"{place}.function.parameters", "must be a JSON schema of type object")
    if function.get("strict") not in (None, True, False):
        _refuse(f"{place}.function.strict", "must be true or false")
    given = {"name": name, "description": description, "parameters": parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in given.items() if value is not None},
    }


def _is_object_schema(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        return False
    return isinstance(schema.get("properties", {}), Mapping)


def _check_choice(
    choice: str | Mapping[str, Any] | None, names: Sequence[str]
) -> tuple[Literal["none", "auto", "required", "named"], str | None]:
    if choice is None:
        return ("auto" if names else "none"), None
    if choice in ("none", "auto", "required"):
        if choice != "none" and not names:
            _refuse("tool_choice", f"is {choice!r}, but the request has no tools")
        return choice, None  # type: ignore[return-value]  # one of the three
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        _refuse(
            "tool_choice",
            "must be 'none', 'auto', 'required' or {'type': 'function', 'function': "
            "{'name': ...}}; to allow only some of the tools, send only those",
        )
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        _refuse(
            "tool_choice",
            f"names the function {name!r}, which is not in tools: {', '.join(names) or 'none'}",
        )
    return "named", name


def _moved(schema: Any, place: str) -> Any:
    """A schema moved to `place` inside another one, with its references adjusted."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


def _refuse(place: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{place} {problem}", param=place.partition("[")[0].partition(".")[0])
