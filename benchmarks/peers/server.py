"""Peers that are servers: streamed requests to OpenAI's /v1/completions with token id prompts."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peers.base import MAX_REQUESTS, Answer, Model, Peer, PeerUnavailable, Running, last_error
from peers.process import Process

START_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 900.0
POLL_S = 0.02


class ServerPeer(Peer):
    """A peer that runs as a command and answers over HTTP."""

    health_path = "/health"
    extra_body: Mapping[str, Any] = {"ignore_eos": True}
    """Request fields in addition to OpenAI's."""

    @abstractmethod
    def command(self, model: Model, fmt: str, port: int) -> list[str]:
        """Build the server's command line."""

    def environment(self) -> Mapping[str, str]:
        """Return environment variables in addition to this process's."""
        return {}

    def launch(self, model: Model, fmt: str) -> Running:
        """Start the server; return when it is healthy."""
        self.check_format(fmt)
        port = free_port()
        process = Process(
            self.command(model, fmt, port),
            self.settings.log_of(f"{self.name}-{model.name}-{fmt}"),
            environment=self.environment(),
        )
        try:
            _wait_until_healthy(process, port, self.health_path)
            return RunningServer(process, port, self.extra_body)
        except BaseException:
            process.end()
            raise


class RunningServer(Running):
    """A running server."""

    def __init__(self, process: Process, port: int, extra_body: Mapping[str, Any]) -> None:
        self.process = process
        self.port = port
        self.extra_body = extra_body
        self.model_name = self._model_name()
        self.pool = ThreadPoolExecutor(MAX_REQUESTS)

    def ask(self, prompts: Sequence[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        """Answer all prompts, `concurrency` at a time, each on its own connection."""
        gate = ThreadPoolExecutor(concurrency) if concurrency < MAX_REQUESTS else self.pool
        try:
            return list(gate.map(lambda prompt: self._ask_one(prompt, num_out), prompts))
        finally:
            if gate is not self.pool:
                gate.shutdown()

    def close(self) -> None:
        """Stop the server."""
        super().close()
        self.pool.shutdown()

    def _ask_one(self, prompt: list[int], num_out: int) -> Answer:
        body = {
            "model": self.model_name,
            "prompt": prompt,
            "max_tokens": num_out,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_body,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        with contextlib.closing(connection):
            payload = json.dumps(body)
            sent = time.monotonic()
            connection.request("POST", "/v1/completions", payload, _JSON)
            response = connection.getresponse()
            if response.status != 200:
                raise PeerUnavailable(f"HTTP {response.status}: {response.read(500)!r}")
            chunks: list[bytes] = []
            times: list[float] = []
            for line in response:
                if line.startswith(b"data: {"):
                    chunks.append(line[6:])
                    times.append(time.monotonic())
        return _to_answer(sent, times, [json.loads(chunk) for chunk in chunks], num_out)

    def _model_name(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models")
            listed = json.loads(connection.getresponse().read())
        return str(listed["data"][0]["id"])


_JSON = {"Content-Type": "application/json"}


def _to_answer(sent: float, times: list[float], chunks: list[dict[str, Any]], num: int) -> Answer:
    """Return the arrival times of the first and last token; check that `num` arrived."""
    if not chunks or "error" in chunks[-1]:
        raise PeerUnavailable(f"a request failed: {chunks[-1:]}")
    with_choices = [i for i, chunk in enumerate(chunks) if chunk.get("choices")]
    reported = [count for chunk in chunks if (count := _tokens_so_far(chunk)) is not None]
    num_tokens = reported[-1] if reported else len(with_choices)
    if num_tokens != num:
        raise PeerUnavailable(f"the answer has {num_tokens} tokens; {num} were requested")
    return Answer(
        sent=sent,
        first=times[with_choices[0]],
        last=times[with_choices[-1]],
        num_tokens=num_tokens,
        num_first=_tokens_so_far(chunks[with_choices[0]]) or 1,
        text="".join(chunks[i]["choices"][0].get("text") or "" for i in with_choices),
    )


def _tokens_so_far(chunk: dict[str, Any]) -> int | None:
    if usage := chunk.get("usage"):
        return int(usage["completion_tokens"])
    if timings := chunk.get("timings"):
        return int(timings["predicted_n"])
    return None


def _wait_until_healthy(process: Process, port: int, path: str) -> None:
    while time.monotonic() < process.started + START_TIMEOUT_S:
        if not process.is_alive():
            raise PeerUnavailable(f"the server ended: {last_error(process.log)}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
        time.sleep(POLL_S)
    raise PeerUnavailable(f"the server was not healthy after {START_TIMEOUT_S:.0f} s")


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
