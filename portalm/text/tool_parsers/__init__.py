"""Registry of tool call parsers: built-in ones, and ones from other packages.

A package adds one with an entry point in the group `portalm.tool_parsers`. The entry point's name
is the value for `--tool-call-parser`; its object is a subclass of
`portalm.text.tool_parsers.base.ToolParser`.
"""

from __future__ import annotations

from functools import lru_cache

from portalm.plugins import Plugins
from portalm.text.chat_template import takes_tools
from portalm.text.tool_parsers.base import ToolParser

TOOL_PARSERS = Plugins(
    ToolParser,  # type: ignore[type-abstract]  # only for issubclass
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
def detect_format(template: str) -> str | None:
    """Return the tool call format that a chat template uses; None if none or several match."""
    if not takes_tools(template):
        return "hermes"  # portalm.text.tool_prompt describes the tools in this format
    found = [name for name in TOOL_PARSERS.names() if TOOL_PARSERS.get(name).recognizes(template)]
    return found[0] if len(found) == 1 else None
