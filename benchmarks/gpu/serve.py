"""`portalm serve` with the 8B shape over HTTP: startup, a thousand requests, TTFT."""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.common import Clock, Settings, model_folder, report, run_sections, settings
from gpu.lengths import lengths_like_sharegpt

MOST_AT_ONCE = 512
"""Requests in flight; each needs an open socket here and in the server."""


def folder_with_tokenizer(config: dict[str, Any]) -> str:
    """Create a folder with the model's config and a dummy tokenizer: prompts are token ids."""
    from tokenizers import Tokenizer, models

    folder = model_folder(config)
    vocab = {f"t{i}": i for i in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocab, unk_token="t0")).save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text("{}")
    return folder


def raise_file_limit() -> int:
    """Raise the limit of open files to its maximum; servers started from now on inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


async def ask(host: str, port: int, body: dict[str, Any]) -> tuple[float, int]:
    """Stream one completion; return seconds to the first token, and the number of tokens.

    Raises:
        RuntimeError: the server did not answer with a stream that ends as streams do.
    """
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps({**body, "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    first, lines = None, []
    async for line in reader:
        lines.append(line)
        if line.startswith(b"data: {") and first is None:
            first = time.perf_counter() - begin
    writer.close()
    if first is None or b"data: [DONE]\n" not in (line.replace(b"\r", b"") for line in lines):
        raise RuntimeError(
            f"the server's answer has no token or no end: {b''.join(lines)[-500:]!r}"
        )
    return first, body["max_tokens"]


async def ask_all(
    host: str, port: int, pairs: list[tuple[int, int]], vocab: int
) -> list[tuple[float, int]]:
    """Send requests, at most `MOST_AT_ONCE` in flight, and wait for all answers."""
    rng = random.Random(1)
    bodies = [
        {
            "prompt": [rng.randrange(3, vocab) for _ in range(num_in)],
            "max_tokens": num_out,
            "temperature": 0,
            "ignore_eos": True,
        }
        for num_in, num_out in pairs
    ]
    free = asyncio.Semaphore(MOST_AT_ONCE)

    async def one(body: dict[str, Any]) -> tuple[float, int]:
        async with free:
            return await ask(host, port, body)

    return await asyncio.gather(*(one(body) for body in bodies))


class Served:
    """The sections; all use the server of `start`."""

    def __init__(self, run: Settings) -> None:
        """Start nothing yet."""
        self.run = run
        self.config = run.model("8b")
        self.server: subprocess.Popen[str] | None = None
        self.address = ("", 0)

    def start(self, clock: Clock) -> None:
        """Start the server; measure the time to its first token."""
        run = self.run
        limit = raise_file_limit()
        folder = folder_with_tokenizer(self.config)
        command = [sys.executable, "-m", "portalm.cli.main", "serve", folder]
        command += ["--load-format", "dummy", "--device", run.device, "--port", "0"]
        command += ["--max-model-len", str(run.scaled(4096, 256)), "--log-level", "warning"]
        begin = time.perf_counter()
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        for line in self.server.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"on http://([\d.]+):(\d+)", line):
                self.address = (found.group(1), int(found.group(2)))
                break
        else:
            raise RuntimeError(f"the server ended with status {self.server.wait()} at startup")
        self._ask([(8, 1)])
        report("8b: exec to first token", time.perf_counter() - begin, "s", open_files=limit)

    def _ask(self, pairs: list[tuple[int, int]]) -> list[tuple[float, int]]:
        return asyncio.run(ask_all(*self.address, pairs, self.config["vocab_size"]))

    def all_at_once(self, clock: Clock) -> None:
        """Measure a thousand requests."""
        pairs = lengths_like_sharegpt(1000)[: 40 if self.run.is_dry else self.run.scaled(1000, 4)]
        if self.run.is_tiny:
            pairs = [(min(p, 20), min(o, 8)) for p, o in pairs]
        begin = time.perf_counter()
        answers = self._ask(pairs)
        taken = time.perf_counter() - begin
        num_tokens = sum(count for _, count in answers)
        name = f"8b: served, {MOST_AT_ONCE} at a time"
        report(name, num_tokens / taken, "tok/s", requests=len(pairs), seconds=taken)

    def one_at_a_time(self, clock: Clock) -> None:
        """Measure the TTFT of single prompts."""
        length = self.run.scaled(1024, 16)
        alone = [self._ask([(length, 4)])[0][0] for _ in range(5)]
        report("8b: TTFT over HTTP, 1024", sorted(alone)[2] * 1e3, "ms")

    def stop(self) -> None:
        """Stop the server."""
        if self.server is None:
            return
        self.server.send_signal(signal.SIGTERM)
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()


def main() -> None:
    """Run the selected sections."""
    run = settings()
    part = Served(run)
    try:
        run_sections(
            run,
            {
                "start": part.start,
                "all at once": part.all_at_once,
                "one at a time": part.one_at_a_time,
            },
        )
    finally:
        part.stop()


if __name__ == "__main__":
    main()
