"""`portalm serve` with the 8B shape over HTTP: startup, a thousand requests at once, TTFT."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.common import Settings, model_folder, report, settings
from gpu.engine import lengths_like_sharegpt


def folder_with_tokenizer(run: Settings) -> str:
    """Create a folder with the model's config and a dummy tokenizer: prompts are token ids."""
    from tokenizers import Tokenizer, models

    config = run.model("8b")
    folder = model_folder(config)
    vocab = {f"t{i}": i for i in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocab, unk_token="t0")).save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text("{}")
    return folder


async def ask(host: str, port: int, body: dict[str, Any]) -> tuple[float, float, int]:
    """Stream one completion; return seconds to the first token, to the last, and tokens."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps({**body, "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    first = None
    async for line in reader:
        if line.startswith(b"data: {") and first is None:
            first = time.perf_counter() - begin
    writer.close()
    if first is None:
        raise RuntimeError("the server sent no token")
    return first, time.perf_counter() - begin, body["max_tokens"]


async def ask_all(host: str, port: int, pairs: list[tuple[int, int]], vocab: int) -> list[Any]:
    """Send all requests at once and wait for their answers."""
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
    return await asyncio.gather(*(ask(host, port, body) for body in bodies))


def main() -> None:
    """Start a server, measure requests, stop the server."""
    run = settings()
    config = run.model("8b")
    command = [sys.executable, "-m", "portalm.cli.main", "serve", folder_with_tokenizer(run)]
    command += ["--load-format", "dummy", "--device", run.device, "--port", "0"]
    command += ["--max-model-len", str(run.scaled(4096, 256)), "--log-level", "warning"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = next(
            (m for line in server.stdout if (m := re.search(r"on http://([\d.]+):(\d+)", line))),
            None,
        )
        if found is None:
            raise SystemExit("the server did not start")
        host, port = found.group(1), int(found.group(2))
        try:
            asyncio.run(ask_all(host, port, [(8, 1)], config["vocab_size"]))
            report("8b: exec to first token", time.perf_counter() - begin, "s")
            pairs = lengths_like_sharegpt(1000)[: run.scaled(1000, 4)]
            if run.is_tiny:
                pairs = [(min(p, 20), min(o, 8)) for p, o in pairs]
            begin = time.perf_counter()
            answers = asyncio.run(ask_all(host, port, pairs, config["vocab_size"]))
            taken = time.perf_counter() - begin
            report(
                "8b: served, all at once",
                sum(a[2] for a in answers) / taken,
                "tok/s",
                requests=len(pairs),
            )
            alone = [
                asyncio.run(ask_all(host, port, [(run.scaled(1024, 16), 4)], config["vocab_size"]))[
                    0
                ][0]
                for _ in range(5)
            ]
            report("8b: TTFT over HTTP, 1k", sorted(alone)[2] * 1e3, "ms")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


if __name__ == "__main__":
    main()
