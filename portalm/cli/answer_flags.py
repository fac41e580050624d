"""Flags for how the model writes tool calls and reasoning."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portalm.server.chat_plan import AnswerFormat


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a command that answers OpenAI-style requests."""
    parser.add_argument(
        "--tool-call-parser",
        default=None,
        metavar="NAME",
        help="format of the model's tool calls: hermes, llama3_json, mistral, pythonic, or the "
        "name of an installed parser (default: detected from the chat template)",
    )
    parser.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="refuse to start if the format of the model's tool calls is unknown",
    )
    parser.add_argument(
        "--reasoning-parser",
        default=None,
        metavar="NAME",
        help="format of the model's reasoning: deepseek_r1, qwen3, or the name of an installed "
        "parser (default: none, reasoning stays part of the answer)",
    )


def answer_format(arguments: argparse.Namespace) -> AnswerFormat:
    """Build the answer format from the flags. Raises `ConfigError` for an unknown parser."""
    from portalm.server.chat_plan import AnswerFormat

    return AnswerFormat(
        tool_call_parser=arguments.tool_call_parser,
        reasoning_parser=arguments.reasoning_parser,
        enable_auto_tool_choice=arguments.enable_auto_tool_choice,
    )
