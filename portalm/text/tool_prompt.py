"""Describe tools to models whose chat template does not support them, in the Hermes format.

The model was not trained on this format and may or may not call the tools, but its calls are parsed
in the same format (portalm.text.tool_parsers.hermes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = """\
You may call functions to help with the user's request. These are their signatures, one a line:
<tools>
{signatures}
</tools>
To call one, write its name and its arguments as JSON between these tags, once for each call:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>
You are then told the result between <tool_response> and </tool_response>."""


def write_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Write tools, calls and results into the messages as plain text.

    Args:
        messages: as returned by `check_messages`.
        tools: functions that the model may call; None or empty adds no description.

    Returns:
        New messages; the tools are described in the system message.
    """
    plain = [_write_message(message) for message in messages]
    if not tools:
        return plain
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(signatures=signatures)
    if plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{introduction}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _write_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    texts = [content] if content else []
    for call in calls:
        function = call["function"]
        text = json.dumps(
            {"name": function.get("name"), "arguments": function["arguments"]}, ensure_ascii=False
        )
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return {"role": message["role"], "content": "\n".join(texts)}
