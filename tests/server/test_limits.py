"""Load and hostile clients: limits are exact, and a bad client does not affect others."""

from __future__ import annotations

import concurrent.futures
import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import RunningServer, make_model_folder, running_server

NULL = ("--device", "null", "--load-format", "dummy")
LONG: dict[str, Any] = {"prompt": "w5", "max_tokens": 19_000, "ignore_eos": True}
"""A request that takes many seconds even on the null device; all tests abort it."""
SHORT = {"prompt": "w5 w6", "max_tokens": 4, "ignore_eos": True}
KEYS = {"one": {"Authorization": "Bearer one"}, "two": {"Authorization": "Bearer two"}}


def make_long_model(folder: Path) -> Path:
    """The tiny model with room for LONG."""
    make_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that runs one request at a time; up to eight wait, at most two seconds."""
    folder = make_long_model(tmp_path_factory.mktemp("limits") / "tiny")
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "8", "--max-num-queued-tokens", "300",
             "--queue-timeout", "2", "--scheduling-policy", "priority")  # fmt: skip
    with running_server(str(folder), *NULL, *flags) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.wait_for("num_requests_running", 0)


class Raw:
    """A client on a raw socket that sends a request, and may disconnect or not read."""

    def __init__(
        self,
        server: RunningServer,
        body: dict[str, object],
        *,
        path: str = "/v1/completions",
        buffer: int = 0,
    ) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect((host, int(port)))
        content = json.dumps(body).encode()
        self.socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )

    def answer(self) -> tuple[int, bytes, dict]:
        """Wait for the response; returns its status, headers and body."""
        data = b""
        while not data.endswith(b"}"):
            data += self.socket.recv(1 << 16)
        self.socket.close()
        headers, _, body = data.partition(b"\r\n\r\n")
        return int(headers.split()[1]), headers.lower(), json.loads(body)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def busy(server: RunningServer, http: httpx.Client) -> Iterator[None]:
    """Keep one request running during the test."""
    with Raw(server, LONG):
        server.wait_for("num_requests_running", 1)
        yield


# -- admission --------------------------------------------------------------------------------


def test_exactly_the_allowed_number_of_a_burst_waits(
    server: RunningServer, http: httpx.Client, busy: None
) -> None:
    asked = [Raw(server, SHORT) for _ in range(24)]
    answers = [one.answer() for one in asked]

    assert sorted(status for status, _, _ in answers) == [429] * 16 + [503] * 8
    for _, headers, error in answers:
        assert b"retry-after" in headers
        assert error["error"]["type"]


def test_waiting_prompt_tokens_are_limited(server: RunningServer, http, busy: None) -> None:
    with Raw(server, {**SHORT, "prompt": [5] * 200}):
        server.wait_for("num_requests_waiting", 1)

        refused = http.post("/v1/completions", json={**SHORT, "prompt": [5] * 101})
        accepted = http.post("/v1/completions", json={**SHORT, "prompt": [5] * 100, "stream": True})

    assert refused.status_code == 429
    assert "200 prompt tokens are waiting" in refused.json()["error"]["message"]
    assert accepted.status_code == 503  # it waited two seconds


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_waits_too_long_is_a_503(http, busy: None, path: str, stream: bool) -> None:
    body = {**SHORT, "stream": stream}
    if "chat" in path:
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "w5"}]
    started = time.monotonic()

    response = http.post(path, json=body)

    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert "waited 2 s in the queue" in response.json()["error"]["message"]
    assert 1.9 < time.monotonic() - started < 10


def test_request_to_an_empty_queue_is_always_accepted(http) -> None:
    response = http.post("/v1/completions", json={**SHORT, "prompt": ["w5"] * 20})

    assert response.status_code == 200
    assert len(response.json()["choices"]) == 20


def test_lower_priority_value_is_served_first(server: RunningServer, http) -> None:
    with Raw(server, LONG):
        server.wait_for("num_requests_running", 1)
        asked = {
            priority: Raw(server, {**SHORT, "max_tokens": 30, "priority": priority})
            for priority in (2, 1, -3)
        }
        server.wait_for("num_requests_waiting", 3)
    ended: list[int] = []
    while len(ended) < 3:
        ready, _, _ = select.select([one.socket for one in asked.values()], [], [], 10)
        for priority in [p for p, one in asked.items() if one.socket in ready]:
            assert asked.pop(priority).answer()[0] == 200
            ended.append(priority)

    assert ended == [-3, 1, 2]


def test_one_tenants_queue_does_not_delay_another(tmp_path: Path) -> None:
    folder = make_long_model(tmp_path / "tiny")
    flags = ("--max-num-seqs", "4", "--api-key", "one", "--api-key", "two")
    with running_server(str(folder), *NULL, *flags) as server, server.client() as http:
        many = {"prompt": [[5, i % 500 + 3] for i in range(1000)], "max_tokens": 8,
                "ignore_eos": True}  # fmt: skip
        done = threading.Event()

        def ask_many() -> None:
            with server.client() as client:
                response = client.post("/v1/completions", json=many, headers=KEYS["one"])
                assert len(response.json()["choices"]) == 1000
            done.set()

        thread = threading.Thread(target=ask_many)
        thread.start()
        while server.metric("num_requests_waiting") < 900:
            time.sleep(0.01)
        single = http.post("/v1/completions", json=SHORT, headers=KEYS["two"])
        waited_for_all = done.is_set()
        waiting = server.metric("num_requests_waiting")
        thread.join(60)

    assert single.status_code == 200
    assert not waited_for_all
    assert waiting > 500


# -- clients that disconnect, or do not read --------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts_the_request(server: RunningServer, http, stream: bool) -> None:
    def num_tokens() -> float:
        return server.metric("generation_tokens_total")

    seconds = num_before = num_after = 0.0
    for _ in range(4):
        with Raw(server, {**LONG, "stream": stream}):
            server.wait_for("num_requests_running", 1)
            started, first = time.monotonic(), num_tokens()
            time.sleep(0.3)
            at_disconnect = num_tokens()
            seconds += time.monotonic() - started
        num_before += at_disconnect - first
        server.wait_for("num_requests_running", 0, seconds=30)
        num_after += num_tokens() - at_disconnect

    assert server.metric("kv_blocks_used") == 0
    # seconds of work after the four disconnects, at the engine's speed just before them
    assert num_after / (num_before / seconds) < 2
    last = num_tokens()
    time.sleep(0.2)
    assert num_tokens() == last


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "w5", "max_tokens": 19_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w5"}]}),
        ("/v1/responses", {"input": "w5"}),
    ],
)
def test_disconnect_is_counted_as_499_and_logs_no_error(
    server: RunningServer, http, path: str, body: dict[str, object]
) -> None:
    before = num_disconnected(http, path)
    with Raw(server, body, path=path):
        server.wait_for("num_requests_running", 1)
    server.wait_for("num_requests_running", 0, seconds=2)

    end = time.monotonic() + 5
    while num_disconnected(http, path) == before:
        assert time.monotonic() < end
    assert not [line for line in server.output if "Traceback" in line]


def num_disconnected(http: httpx.Client, path: str) -> float:
    """Number of responses of this endpoint whose client had disconnected (status 499)."""
    pattern = rf'portalm:http_requests_total{{handler="{path}",[^}}]*status="499"}} (\S+)'
    return sum(map(float, re.findall(pattern, http.get("/metrics").text)))


def test_slow_reader_does_not_delay_others(tmp_path: Path) -> None:
    def memory(server: RunningServer) -> float:
        text = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    folder = make_long_model(tmp_path / "tiny")
    slow = {**LONG, "max_tokens": 1_500, "stream": True}
    with running_server(str(folder), *NULL) as server, server.client() as http:
        alone = timed_stream(http)
        before = memory(server)
        with Raw(server, slow, buffer=4096), Raw(server, slow, buffer=4096):
            server.wait_for("num_requests_running", 2)
            with_slow_readers = timed_stream(http)
            # the requests finish although their answers are not read
            server.wait_for("num_requests_running", 0, seconds=90)
            grown = memory(server) - before

    assert with_slow_readers < 5 * alone + 1
    assert grown < 40  # MiB; queueing one delta per token would take more


def timed_stream(http: httpx.Client) -> float:
    started = time.monotonic()
    body = {**SHORT, "max_tokens": 300, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert sum(line.startswith("data: {") for line in response.iter_lines()) == 300
    return time.monotonic() - started


# -- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "about"),
    [
        ({"prompt": ["w5"] * 4097}, 400, "prompt"),
        ({"prompt": ["w5"] * 2050, "n": 2}, 400, "prompt"),
        ({"prompt": [5] * (1 << 20 | 1)}, 400, "prompt"),
        ({"prompt": [1.5] * 300_000}, 400, "prompt"),
        ({"prompt": "w5 " * 9_000_000}, 400, "prompt"),
        ({"prompt": "w" * 34_000_000}, 413, None),
        ({"n": 1025}, 400, "n"),
        ({"stop": ["x"] * 65}, 400, "stop"),
        ({"stop": "x" * 1025}, 400, "stop"),
        ({"bad_words": ["w7"] * 257}, 400, "bad_words"),
        ({"stop_token_ids": [7] * 1025}, 400, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
        ({"allowed_token_ids": [7] * 262_145}, 400, "allowed_token_ids"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
        ({"priority": 2**31}, 400, "priority"),
        ({"request_id": "two words"}, 400, "request_id"),
        ({"request_id": "x\r\ny"}, 400, "request_id"),
        ({"request_id": "x" * 257}, 400, "request_id"),
        ({"model": "\ud800"}, 404, "model"),
        ({"\ud800": 1}, 400, None),
    ],
    ids=lambda x: str(x)[:24],
)
def test_excessive_values_are_rejected_naming_the_field(http, body, status, about) -> None:
    response = http.post(
        "/v1/completions", content=json.dumps({**SHORT, **body}),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip

    assert response.status_code == status
    assert response.json()["error"]["param"] == about
    assert len(response.content) < 4096


def test_tokenizing_a_long_text_does_not_delay_others(server: RunningServer, http) -> None:
    text = "w5 " * 100_000  # too many tokens, but short enough to be tokenized and counted

    def ask() -> int:
        with server.client() as client:
            return client.post("/tokenize", json={"prompt": text}).status_code

    shares = []  # time of the slowest other request, as a share of the time of tokenizing
    for _ in range(3):  # a busy machine may delay one round; a server that blocks delays all
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            started, slowest = time.monotonic(), 0.0
            asked = pool.submit(ask)
            while not asked.done():
                asked_at = time.monotonic()
                assert http.get("/health/live").status_code == 200
                slowest = max(slowest, time.monotonic() - asked_at)
            shares.append(slowest / (time.monotonic() - started))
        assert asked.result() == 200

    assert min(shares) < 0.5


def test_body_without_a_length_is_limited_too(http) -> None:
    response = http.post(
        "/v1/completions",
        content=(b" " * (1 << 20) for _ in range(40)),
        headers={"Content-Type": "application/json"},
    )

    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_headers_are_limited(server: RunningServer, http) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n")
        answer = b""
        for _ in range(1000):
            try:
                raw.sendall(b"X-Header: " + b"x" * 1000 + b"\r\n")
            except OSError:
                break
            time.sleep(0.001)
        raw.settimeout(5)
        with pytest.MonkeyPatch.context():
            try:
                answer = raw.recv(4096)
            except OSError:
                answer = b"HTTP/1.1 400"  # the server closed the connection with unread headers

    assert answer.startswith(b"HTTP/1.1 400")
    assert http.get("/health/live").status_code == 200


def test_request_id_in_use_is_rejected_and_can_be_reused_later(server: RunningServer, http) -> None:
    with Raw(server, {**LONG, "request_id": "mine"}):
        server.wait_for("num_requests_running", 1)
        again = http.post("/v1/completions", json={**SHORT, "request_id": "mine"})
        of_two = http.post("/v1/completions", json={**SHORT, "prompt": ["w5", "w6"]})
    server.wait_for("num_requests_running", 0)

    assert again.status_code == 400
    assert again.json()["error"]["param"] == "request_id"
    assert of_two.status_code == 503  # it waited too long
    freed = http.post("/v1/completions", json={**SHORT, "request_id": "mine"})
    assert freed.status_code == 200


# -- chat templates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        {"chat_template_kwargs": {"template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"self": 1}},
        {"messages": [{"role": "user", "content": "w5"}] * 4097},
    ],
    ids=lambda more: str(more)[:50],
)
def test_requests_cannot_set_templates_or_reserved_variables(http, more: dict[str, object]) -> None:
    body = {"messages": [{"role": "user", "content": "w5"}], "max_tokens": 1, **more}

    response = http.post("/v1/chat/completions", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(more))
