"""`portalm pull`: fetch a model into the cache."""

from __future__ import annotations

import argparse

from portalm.config import DEFAULT_MODEL


def add_pull(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`portalm pull`: fetch a model, so that it starts without a network."""
    parser = commands.add_parser("pull", help="fetch a model into the cache")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a Hugging Face id")
    parser.add_argument("--revision", default=None, help="branch, tag or commit on the hub")
    parser.set_defaults(run=run_pull)


def run_pull(arguments: argparse.Namespace) -> int:
    """Fetch it, unless it is here; print where it lies."""
    from portalm.models.hub import resolve_model

    path = resolve_model(arguments.model, revision=arguments.revision, say=print)
    print(f"{arguments.model}: {path}")
    return 0
