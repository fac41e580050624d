"""`portalm bench startup`: time from starting a server to its first token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from portalm.cli.engine_flags import add_engine_flags

if TYPE_CHECKING:
    import subprocess

    import httpx

_LOOK_S = 0.005


def add_bench_startup(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm bench startup`: time until a server listens, is ready and answers."""
    parser = kinds.add_parser("startup", help="time from starting a server to its first token")
    parser.add_argument(
        "--num-iters", type=int, default=3, help="number of servers to start, one after another"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="maximum seconds per start")
    parser.add_argument(
        "--result-json", default=None, help="file to write all figures to as JSON (default: none)"
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run_bench_startup)


def run_bench_startup(arguments: argparse.Namespace) -> int:
    """Start the servers and print a table."""
    from portalm.cli.bench.figures import percentile, report
    from portalm.errors import ConfigError
    from portalm.progress import ProgressBar

    if arguments.num_iters < 1:
        raise ConfigError(f"--num-iters must be at least 1, not {arguments.num_iters}")
    starts = []
    with ProgressBar("Starting servers", arguments.num_iters, unit="starts") as bar:
        for _ in range(arguments.num_iters):
            starts.append(_start_once(arguments))
            bar.update()
    figures: dict[str, float | int] = {"num_iters": len(starts)}
    for name in starts[0]:
        seconds = [one[name] for one in starts]
        figures[f"first_{name}_s"] = seconds[0]  # files may not be in the page cache yet
        figures[f"median_{name}_s"] = percentile(seconds, 50)
    report(figures, arguments.result_json)
    return 0


def _start_once(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds from starting a server until it listens, is ready and answers, and its own phases."""
    import subprocess
    import sys
    import tempfile
    import time

    import httpx
    import yaml

    from portalm.cli.engine_flags import engine_settings

    with tempfile.TemporaryDirectory(prefix="portalm-") as folder:
        settings = engine_settings(arguments)
        if "hf_overrides" in settings:
            settings["hf_overrides"] = dict(settings["hf_overrides"])
        config, socket, log = (Path(folder) / name for name in ("config.yaml", "socket", "log"))
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "portalm.cli.main", "serve"]
        started = time.perf_counter()
        with log.open("w") as output:
            server = subprocess.Popen(
                [*command, "--config", str(config), "--uds", str(socket)],
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            transport = httpx.HTTPTransport(uds=str(socket))
            with httpx.Client(transport=transport, base_url="http://server", timeout=60) as http:
                seen = {}
                for name, path in (("listening", "/health/live"), ("ready", "/health/ready")):
                    _wait_for(http, path, server, log, started + arguments.timeout)
                    seen[name] = time.perf_counter() - started
                body = {"prompt": [0, 0], "max_tokens": 1, "ignore_eos": True}
                http.post("/v1/completions", json=body).raise_for_status()
                seen["first_token"] = time.perf_counter() - started
                return seen | _phases(http)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(
    http: httpx.Client, path: str, server: subprocess.Popen[bytes], log: Path, end: float
) -> None:
    """Wait until `path` returns 200. Raises `PortaLMError` if the server exits or is too slow."""
    import contextlib
    import time

    import httpx

    from portalm.errors import PortaLMError

    while True:
        with contextlib.suppress(httpx.TransportError):
            if http.get(path).status_code == 200:
                return
        if server.poll() is not None:
            raise PortaLMError(f"the server exited: {log.read_text().strip()[-500:]}")
        if time.perf_counter() > end:
            raise PortaLMError("the server did not start within --timeout seconds")
        time.sleep(_LOOK_S)


def _phases(http: httpx.Client) -> dict[str, float]:
    """Seconds of each startup phase, from the engine's metrics."""
    import re

    found = re.findall(
        r'^portalm:startup_seconds{.*phase="(\w+)".*} (\S+)$',
        http.get("/metrics").text,
        re.MULTILINE,
    )
    return {f"engine_{phase}": float(seconds) for phase, seconds in found}
