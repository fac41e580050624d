"""Running one part of a stage as a process, within a time limit."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Take = Callable[[str], None]


def run_part(
    command: list[str],
    limit_s: float,
    environment: Mapping[str, str],
    log: Path,
    take: Take,
) -> tuple[int | None, str]:
    """Run a command, write all of its output to `log`, and pass each line to `take`.

    Returns:
        Its exit status (None: stopped at the time limit), and the end of its output.
    """
    until, lines = time.monotonic() + limit_s, []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    with process, _killed_at_exit(process), log.open("a") as file:
        for line in _lines_until(process.stdout.fileno(), until):
            lines.append(line)
            file.write(line + "\n")
            file.flush()
            take(line)
        if time.monotonic() >= until:
            return None, "\n".join(lines[-12:])
        return process.wait(), "\n".join(lines[-40:])


@contextlib.contextmanager
def _killed_at_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process group of `process` when the context ends."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _lines_until(descriptor: int, until: float) -> Iterator[str]:
    """Yield lines as they arrive, until the end of the file or the time `until`."""
    rest = b""
    while (left := until - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            return
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            if rest:
                yield rest.decode(errors="replace")
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
