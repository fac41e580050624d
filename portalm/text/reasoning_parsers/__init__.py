"""Registry of reasoning parsers: built-in ones, and ones from other packages.

A package adds one with an entry point in the group `portalm.reasoning_parsers`. The entry point's
name is the value for `--reasoning-parser`; its object is a subclass of
`portalm.text.reasoning_parsers.base.ReasoningParser`.
"""

from __future__ import annotations

from portalm.plugins import Plugins
from portalm.text.reasoning_parsers.base import ReasoningParser

REASONING_PARSERS = Plugins(
    ReasoningParser,  # type: ignore[type-abstract]  # only for issubclass
    kind="reasoning parser",
    group="portalm.reasoning_parsers",
    own={
        "deepseek_r1": "portalm.text.reasoning_parsers.deepseek_r1:DeepSeekR1ReasoningParser",
        "qwen3": "portalm.text.reasoning_parsers.qwen3:Qwen3ReasoningParser",
    },
)
