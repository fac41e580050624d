"""Tools for models whose chat template knows none: described, and written, in Hermes' format.

The model was not trained on it and may call or not; but what it is shown is how its calls are read
(portalm.text.tool_parsers.hermes).
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
    """`messages` (as `check_messages` gives them) with tools, calls and results as plain text."""
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
