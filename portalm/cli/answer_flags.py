"""Flags of verbs that answer HTTP requests: how the model writes more than content."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portalm.server.chat_plan import AnswerFormat


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--tool-call-parser",
        default=None,
        metavar="NAME",
        help="how the model writes tool calls: hermes, llama3_json, mistral, pythonic, or what a "
        "package brings; without it the chat template tells",
    )
    parser.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="refuse to start where nothing tells how the model writes tool calls",
    )
    parser.add_argument(
        "--reasoning-parser",
        default=None,
        metavar="NAME",
        help="how the model writes its reasoning: deepseek_r1, qwen3, or what a package brings; "
        "without it reasoning is part of the answer",
    )


def answer_format(arguments: argparse.Namespace) -> AnswerFormat:
    """What the flags say. Raises `ConfigError` for a parser that there is not."""
    from portalm.server.chat_plan import AnswerFormat

    return AnswerFormat(
        tool_call_parser=arguments.tool_call_parser,
        reasoning_parser=arguments.reasoning_parser,
        enable_auto_tool_choice=arguments.enable_auto_tool_choice,
    )
