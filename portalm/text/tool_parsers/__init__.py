"""Formats of tool calls, by name: ours, and those that other packages bring.

A package adds one with an entry point of the group `portalm.tool_parsers`: its name is what
`--tool-call-parser` takes, its value a subclass of `portalm.text.tool_parsers.base.ToolParser`.
"""

from __future__ import annotations

from functools import lru_cache

from portalm.plugins import Plugins
from portalm.text.chat_template import takes_tools
from portalm.text.tool_parsers.base import ToolParser

TOOL_PARSERS = Plugins(
    ToolParser,  # type: ignore[type-abstract]  # only to compare with
    kind="tool call parser",
    group="portalm.tool_parsers",
    own={
        "hermes": "portalm.text.tool_parsers.hermes:HermesToolParser",
        "llama3_json": "portalm.text.tool_parsers.llama3_json:Llama3JsonToolParser",
        "mistral": "portalm.text.tool_parsers.mistral:MistralToolParser",
        "pythonic": "portalm.text.tool_parsers.pythonic:PythonicToolParser",
    },
)


@lru_cache(maxsize=64)
def recognise(template: str) -> str | None:
    """The format that a chat template teaches; None: none that is known, or more than one."""
    if not takes_tools(template):
        return "hermes"  # which portalm.text.tool_prompt writes in its place
    found = [name for name in TOOL_PARSERS.names() if TOOL_PARSERS.get(name).recognises(template)]
    return found[0] if len(found) == 1 else None
