"""`portalm bench`: the benchmark commands."""

from __future__ import annotations

import argparse

from portalm.cli.bench.latency import add_bench_latency
from portalm.cli.bench.serve import add_bench_serve
from portalm.cli.bench.startup import add_bench_startup
from portalm.cli.bench.throughput import add_bench_throughput


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm bench` and its subcommands."""
    parser = commands.add_parser("bench", help="benchmark a server, an engine, or its startup")
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")
    for add in (add_bench_serve, add_bench_throughput, add_bench_latency, add_bench_startup):
        add(kinds)
