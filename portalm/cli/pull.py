"""`portalm pull`: download a model into the cache."""

from __future__ import annotations

import argparse

from portalm.config import DEFAULT_MODEL


def add_pull(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm pull`: download a model, so that it later loads without a network."""
    parser = commands.add_parser("pull", help="download a model into the cache")
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="Hugging Face id of the model"
    )
    parser.add_argument(
        "--revision",
        default=None,
        help="branch, tag or commit on the Hugging Face hub (default: the default branch)",
    )
    parser.set_defaults(run=run_pull)


def run_pull(arguments: argparse.Namespace) -> int:
    """Download the model unless it is cached; print its path."""
    from portalm.models.hub import resolve_model

    path = resolve_model(arguments.model, revision=arguments.revision, say=print)
    print(f"{arguments.model}: {path}")
    return 0
