"""Peers that are Python libraries: a worker process in their environment.

Each call is one JSON line in each direction. The peer's own file is the program: it imports its
library in a function, so that the comparison can import the file without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from peers.base import Answer, Model, Peer, PeerUnavailable, Running, Venv, last_error
from peers.process import Process

CALL_TIMEOUT_S = 3600.0
_FOLDER = Path(__file__).parents[1]

Generate = Callable[[list[list[int]], int, int], list[Answer]]


class WorkerPeer(Peer):
    """A peer that runs as `python -m peers.NAME` in its own environment."""

    module: str

    def arguments(self, model: Model, fmt: str) -> list[str]:
        """Return the worker's command-line arguments."""
        return [str(model.folder), fmt]

    def launch(self, model: Model, fmt: str) -> Running:
        """Start the worker; return when the model is loaded."""
        self.check_format(fmt)
        process = Process(
            [
                str(Venv(self.settings, self.name).python),
                *("-m", self.module),
                *self.arguments(model, fmt),
            ],
            self.settings.log_of(f"{self.name}-{model.name}-{fmt}"),
            environment={"OMP_NUM_THREADS": str(len(self.settings.cpus))},
            cwd=_FOLDER,
            is_piped=True,
        )
        try:
            return RunningWorker(process)
        except BaseException:
            process.end()
            raise


class RunningWorker(Running):
    """A running worker."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._receive()

    def ask(self, prompts: Sequence[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        """Answer all prompts, `concurrency` at a time, in the worker."""
        assert self.process.popen.stdin is not None
        call = {"prompts": prompts, "num_out": num_out, "concurrency": concurrency}
        print(json.dumps(call), file=self.process.popen.stdin, flush=True)
        answers = [Answer(**one) for one in json.loads(self._receive())]
        if any(one.num_tokens != num_out for one in answers):
            raise PeerUnavailable(f"it did not answer with {num_out} tokens: {answers[0]}")
        return answers

    def _receive(self) -> str:
        stdout = self.process.popen.stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], CALL_TIMEOUT_S)
        if not readable:
            raise PeerUnavailable(f"no message from the worker for {CALL_TIMEOUT_S:.0f} s")
        line = stdout.readline()
        if not line:
            self.process.popen.wait()
            raise PeerUnavailable(f"the worker ended: {last_error(self.process.log)}")
        return line


def serve_calls(load: Callable[[], Generate]) -> None:
    """Run the worker: load, then answer calls until stdin is closed."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library's output goes to the log
    generate = load()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        answers = generate(call["prompts"], call["num_out"], call["concurrency"])
        print(json.dumps([dataclasses.asdict(one) for one in answers]), file=out, flush=True)
