"""Every flag of every command has a help text that states its default."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from portalm.cli.main import build_parser
from portalm.config import EngineConfig


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


ARGUMENTS = {
    f"{parser.prog} {'/'.join(action.option_strings) or action.dest}": action
    for parser in parsers(build_parser())
    for action in parser._actions
    if not isinstance(
        action, argparse._HelpAction | argparse._VersionAction | argparse._SubParsersAction
    )
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_help_describes_the_argument_and_its_default(name: str) -> None:
    action = ARGUMENTS[name]
    text = action.help or ""
    description, _, default = text.rpartition(" (")

    assert len(description.split()) >= 2, text
    assert default.endswith(")"), text
    assert default.startswith(("default: ", "required", "on by default", "off by default")), text
    assert not re.search(r"None|\[\]|\(\)|SUPPRESS|\binf\b", default), text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("portalm serve --max-num-seqs", f"(default: {EngineConfig().max_num_seqs})"),
        ("portalm generate --model", f"(default: {EngineConfig().model})"),
        ("portalm serve --port", "(default: 8000)"),
        ("portalm serve --enable-prefix-caching/--no-enable-prefix-caching", "(on by default)"),
        ("portalm serve --enforce-eager", "(off by default)"),
        ("portalm run-batch -i/--input-file", "(required)"),
    ],
)
def test_defaults_are_those_of_the_code(name: str, value: str) -> None:
    assert (ARGUMENTS[name].help or "").endswith(value)


def test_every_command_has_a_help_page() -> None:
    for parser in parsers(build_parser()):
        assert parser.prog in parser.format_help()
