"""Formats of reasoning, by name: ours, and those that other packages bring.

A package adds one with an entry point of the group `portalm.reasoning_parsers`: its name is what
`--reasoning-parser` takes, its value a subclass of
`portalm.text.reasoning_parsers.base.ReasoningParser`.
"""

from __future__ import annotations

from portalm.plugins import Plugins
from portalm.text.reasoning_parsers.base import ReasoningParser

REASONING_PARSERS = Plugins(
    ReasoningParser,  # type: ignore[type-abstract]  # only to compare with
    kind="reasoning parser",
    group="portalm.reasoning_parsers",
    own={
        "deepseek_r1": "portalm.text.reasoning_parsers.deepseek_r1:DeepSeekR1ReasoningParser",
        "qwen3": "portalm.text.reasoning_parsers.qwen3:Qwen3ReasoningParser",
    },
)
