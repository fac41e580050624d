"""Default values in help texts, taken from the parsers and from `EngineConfig`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from portalm.config import EngineConfig


def state_defaults(parser: argparse.ArgumentParser) -> None:
    """Append the default to the help text of each argument of `parser` and its subcommands.

    A help text that states a default itself is kept: there, None or an empty list has a meaning
    that only words describe.
    """
    settings = {field.name: field.default for field in fields(EngineConfig)}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                state_defaults(child)
        elif action.help is not None and "(default" not in action.help:
            action.help += _default_text(action, settings)


def _default_text(action: argparse.Action, settings: dict[str, Any]) -> str:
    if isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
        return ""
    if action.required:
        return " (required)"
    # engine flags are left out of the namespace unless given: `EngineConfig` has their defaults
    default = settings[action.dest] if action.default == argparse.SUPPRESS else action.default
    if action.nargs == 0:
        return " (on by default)" if default else " (off by default)"
    return f" (default: {default})"
