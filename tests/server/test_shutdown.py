"""SIGTERM: the server is not ready, running requests may finish, the rest return what they have."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import RunningServer, running_server
from tests.server.test_limits import LONG, NULL, Raw, make_long_model

SOON = {**LONG, "max_tokens": 1500}
"""A request that finishes in a second or two."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_long_model(tmp_path / "tiny")


class InFlight(threading.Thread):
    """A request in flight, sent from a thread."""

    def __init__(self, server: RunningServer, body: dict[str, object]) -> None:
        super().__init__()
        self.server, self.body = server, body
        self.status, self.text = 0, ""
        self.start()

    def run(self) -> None:
        with self.server.client() as http:
            try:
                response = http.post("/v1/completions", json=self.body)
                self.status, self.text = response.status_code, response.text
            except httpx.TransportError as error:
                self.text = repr(error)

    def chunks(self) -> list[dict]:
        lines = [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def test_running_requests_finish_and_new_ones_are_rejected(folder: Path) -> None:
    with running_server(str(folder), *NULL) as server, server.client() as http:
        asked = [InFlight(server, {**SOON, "stream": stream}) for stream in (False, True)]
        server.wait_for("num_requests_running", 2)

        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        ready = http.get("/health/ready").status_code
        live = http.get("/health/live").status_code
        refused = http.post("/v1/completions", json=SOON)
        for one in asked:
            one.join(60)
        status = server.process.wait(10)

    assert (ready, live, status) == (503, 200, 0)
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    whole, stream = asked
    assert json.loads(whole.text)["usage"]["completion_tokens"] == SOON["max_tokens"]
    assert stream.chunks()[-1]["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in "".join(server.output)


def test_aborted_requests_return_their_partial_text(folder: Path) -> None:
    with running_server(str(folder), *NULL, "--shutdown-timeout", "0.5") as server:
        asked = [InFlight(server, {**LONG, "stream": stream}) for stream in (False, True)]
        does_not_read = Raw(server, {**LONG, "stream": True}, buffer=4096)
        server.wait_for("num_requests_running", 3)

        server.process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        for one in asked:
            one.join(20)
        seconds = time.monotonic() - sent
        status = server.process.wait(15)
        does_not_read.socket.close()

    assert status == 0
    assert seconds < 5
    whole, stream = asked
    [choice] = json.loads(whole.text)["choices"]
    assert choice["finish_reason"] == "abort"
    assert choice["text"].startswith("w")
    chunks = stream.chunks()
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:]] == [None, "abort"]
    text = "".join(c["choices"][0]["text"] for c in chunks)
    length = min(len(text), len(choice["text"]))
    assert length
    assert text[:length] == choice["text"][:length]
    assert "Traceback" not in "".join(server.output)


def test_second_sigterm_shuts_down_at_once(folder: Path) -> None:
    with running_server(str(folder), *NULL) as server:
        engine = server.engine_pid()
        asked = InFlight(server, {**LONG, "stream": True})
        server.wait_for("num_requests_running", 1)

        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        status = server.process.wait(10)
        seconds = time.monotonic() - sent
        asked.join(10)

    assert status == 0
    assert seconds < 10  # without it: 30 s, for the request to end
    assert "Error" in asked.text  # the connection was dropped
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
    assert "Traceback" not in "".join(server.output)
