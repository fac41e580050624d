"""`portalm`: run a command; a PortaLMError becomes one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from portalm import __version__
from portalm.cli.bench.command import add_bench
from portalm.cli.chat import add_chat
from portalm.cli.config_file import CommandParser
from portalm.cli.conformance import add_conformance
from portalm.cli.devices import add_collect_env, add_devices, add_doctor
from portalm.cli.flag_defaults import state_defaults
from portalm.cli.generate import add_generate
from portalm.cli.pull import add_pull
from portalm.cli.run_batch import add_run_batch
from portalm.cli.serve import add_serve
from portalm.errors import PortaLMError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands. The parsed arguments have the function to call as `run`."""
    parser = argparse.ArgumentParser(
        prog="portalm", description="LLM inference and serving that runs fast on any accelerator."
    )
    parser.add_argument("--version", action="version", version=f"portalm {__version__}")
    commands: argparse._SubParsersAction[Any] = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for add in (
        add_serve,
        add_generate,
        add_chat,
        add_run_batch,
        add_bench,
        add_pull,
        add_devices,
        add_doctor,
        add_conformance,
        add_collect_env,
    ):
        add(commands)
    state_defaults(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        arguments = build_parser().parse_args(argv)
        status = arguments.run(arguments)
    except PortaLMError as error:
        print(f"portalm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
