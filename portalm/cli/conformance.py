"""`portalm conformance`: test a backend against the reference."""

from __future__ import annotations

import argparse


def add_conformance(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm conformance`: run the conformance kit on one backend."""
    parser = commands.add_parser("conformance", help="test a backend against the reference")
    parser.add_argument("--device", default="auto", help="backend to test")
    parser.add_argument(
        "--level",
        action="append",
        default=[],
        help="level to run: L0 to L4, or claims, operations, laws, models, serving; may be "
        "repeated (default: all)",
    )
    parser.add_argument(
        "-k",
        dest="pattern",
        metavar="TEXT",
        default="",
        help="run only checks whose name contains this text (default: all)",
    )
    parser.add_argument(
        "--json",
        dest="json_path",
        metavar="FILE",
        default=None,
        help="file to write the results to as JSON (default: none)",
    )
    parser.set_defaults(run=run_conformance)


def run_conformance(arguments: argparse.Namespace) -> int:
    """Print a table of results; return 1 if a check failed."""
    from pathlib import Path

    from portalm.backend import load_backend
    from portalm.conformance.kit import run_kit
    from portalm.conformance.report import as_json, as_table

    backend = load_backend(arguments.device)
    results = run_kit(backend, levels=arguments.level, pattern=arguments.pattern)
    print(as_table(backend.name, results))
    if arguments.json_path is not None:
        Path(arguments.json_path).write_text(as_json(backend, results))
    return 1 if any(result.status == "fail" for result in results) else 0
