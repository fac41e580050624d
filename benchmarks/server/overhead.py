"""Measure the cost of HTTP: the same work through `portalm serve` and through `LLM.generate`.

    python benchmarks/server/overhead.py [--streams 32] [--rounds 3] [--result-json FILE]

Both sides load the default model in separate processes and alternate; the idle one costs
nothing. The client is a process too: it sends all requests at once and counts the tokens of the
answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portalm.config import DEFAULT_MODEL


def make_prompts(streams: int, length: int, seed: int) -> list[list[int]]:
    """Return random token ids that differ for every seed, so that there are no prefix hits."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40_000) for _ in range(length)] for _ in range(streams)]


# -- over HTTP --------------------------------------------------------------------------------


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, int, int]]:
    """Start a server on loopback; yield host, port and process id."""
    command = [sys.executable, "-m", "portalm.cli.main", "serve", model, "--port", "0"]
    command += ["--log-level", "warning", "--disable-log-stats"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if match := re.search(r"on http://([\d.]+):(\d+)", line):
                    break
            else:
                raise SystemExit("the server did not start")
            yield match.group(1), int(match.group(2)), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def ask_all(host: str, port: int, bodies: list[dict[str, Any]]) -> list[int]:
    """Stream all answers concurrently; return the token count of each from its last chunk."""
    poll = selectors.DefaultSelector()
    for i, body in enumerate(bodies):
        content = json.dumps(body).encode()
        connection = socket.create_connection((host, port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        poll.register(connection, selectors.EVENT_READ, i)
    ends = [b""] * len(bodies)
    counts = [0] * len(bodies)
    while poll.get_map():
        for key, _ in poll.select():
            data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            ends[key.data] = ends[key.data][-600:] + data
            if not data or b"[DONE]" in ends[key.data]:
                poll.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                found = re.findall(rb'"completion_tokens":(\d+)', ends[key.data])
                counts[key.data] = int(found[-1]) if found else -1
    return counts


def run_client(arguments: argparse.Namespace) -> None:
    """Run the client process: one job per line on stdin, its seconds on stdout."""
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        counts = ask_all(job["host"], job["port"], job["bodies"])
        seconds = time.perf_counter() - started
        assert counts == [body["max_tokens"] for body in job["bodies"]], counts
        print(json.dumps(seconds), flush=True)


# -- in process ----------------------------------------------------------------------------------


def run_llm(arguments: argparse.Namespace) -> None:
    """Run the `LLM` process: one job per line on stdin, its seconds on stdout."""
    from portalm import LLM, SamplingParams

    llm = LLM(model=arguments.model)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == job["max_tokens"] for o in outputs)
        print(json.dumps(seconds), flush=True)


class Worker:
    """A process of this script that runs jobs and returns their seconds."""

    def __init__(self, role: str, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--role", role, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def run(self, job: dict[str, Any]) -> float:
        """Run a job; return its seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        """Stop the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print a line per round and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result-json", default=None)
    parser.add_argument("--role", choices=("main", "client", "llm"), default="main")
    arguments = parser.parse_args()
    if arguments.role != "main":
        {"client": run_client, "llm": run_llm}[arguments.role](arguments)
        return

    llm, client = Worker("llm", arguments.model), Worker("client", arguments.model)
    rounds = []
    with server(arguments.model) as (host, port, pid):
        for number in range(-1, arguments.rounds):  # the first round warms up
            num_tokens = arguments.tokens if number >= 0 else 4
            prompts = make_prompts(arguments.streams, arguments.prompt_tokens, number + 1)
            bodies = [
                {
                    "prompt": prompt,
                    "max_tokens": num_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                for prompt in prompts
            ]
            jobs = {
                "llm": lambda p=prompts, n=num_tokens: llm.run({"prompts": p, "max_tokens": n}),
                "http": lambda b=bodies: client.run({"host": host, "port": port, "bodies": b}),
            }
            order = ["llm", "http"] if number % 2 else ["http", "llm"]
            before = cpu_seconds(pid)
            seconds = {name: jobs[name]() for name in order}
            if number < 0:
                continue
            all_tokens = num_tokens * arguments.streams
            rounds.append(
                {
                    **{name: all_tokens / s for name, s in seconds.items()},
                    "ratio": seconds["llm"] / seconds["http"],
                    "api_us_a_token": (cpu_seconds(pid) - before) / all_tokens * 1e6,
                }
            )
            print(
                "LLM {llm:.1f} tokens/s, HTTP {http:.1f} tokens/s, ratio {ratio:.3f}, API process "
                "{api_us_a_token:.0f} us a token".format(**rounds[-1]),
                flush=True,
            )
    llm.end()
    client.end()
    median = statistics.median(one["ratio"] for one in rounds)
    print(f"{arguments.streams} streams: over HTTP {median:.3f} of LLM.generate (median)")
    if arguments.result_json:
        result = {**vars(arguments), "median_ratio": median, "rounds": rounds}
        Path(arguments.result_json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
