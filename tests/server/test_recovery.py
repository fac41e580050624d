"""Engines that are killed or hang while streams run: answers are complete and unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import RunningServer, make_model_folder, running_server

pytestmark = pytest.mark.model

GREEDY = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "seed": 11, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--device", "cpu", "--max-model-len", "1024") as running:
        yield running


def stream(
    http: httpx.Client, body: dict[str, object], on_chunk: Callable[[int], object] = lambda _: None
) -> str:
    """Return the text of a streamed completion; `on_chunk` gets the number of chunks so far."""
    text, num_chunks = "", 0
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["text"]
            num_chunks += 1
            on_chunk(num_chunks)
    return text


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until the condition holds; returns how long it took, in seconds."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(0.1)
    raise AssertionError(f"condition not met within {seconds} s")


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_stream_survives_an_engine_crash(server: RunningServer, params: dict[str, object]) -> None:
    body = {"prompt": "Once upon a time there was a fox who", **params}
    with server.client() as http:
        undisturbed = stream(http, body)
        restarts = server.metric("engine_restarts_total")

        def kill_at_10(num_chunks: int) -> None:
            if num_chunks == 10:
                os.kill(server.engine_pid(), signal.SIGKILL)

        disturbed = stream(http, body, kill_at_10)

        assert disturbed == undisturbed
        assert server.metric("engine_restarts_total") == restarts + 1
        steps = server.metric("engine_steps_total")  # of both engines
        assert server.metric("iteration_tokens_total_count") == steps
        assert http.get("/health").status_code == 200


def test_several_answers_and_their_logprobs_survive_an_engine_crash(server: RunningServer) -> None:
    body = {
        "prompt": "The best thing about the sea is",
        "n": 3,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "seed": 5,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    with server.client() as http:
        undisturbed = http.post("/v1/completions", json=body).json()
        killer = threading.Timer(0.3, lambda: os.kill(server.engine_pid(), signal.SIGKILL))
        killer.start()
        disturbed = http.post("/v1/completions", json=body).json()
        killer.join()

    assert disturbed["usage"]["completion_tokens"] == 120
    for one, other in zip(disturbed["choices"], undisturbed["choices"], strict=True):
        assert one["text"] == other["text"]
        assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(
            other["logprobs"]["token_logprobs"], abs=1e-3
        )
    assert len(disturbed["choices"][0]["prompt_logprobs"]) == len(
        undisturbed["choices"][0]["prompt_logprobs"]
    )


def test_request_sent_during_a_restart_is_answered(server: RunningServer) -> None:
    with server.client() as http:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: http.get("/health").status_code == 503, 5)

        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        assert stream(http, {"prompt": "The capital of France is", **GREEDY}).startswith(" Paris")
        assert http.get("/health/ready").status_code == 200


def test_request_that_keeps_crashing_the_engine_fails_by_name(server: RunningServer) -> None:
    """Three engines crash while it runs, the last with no other request: it is not retried."""
    answers: list[httpx.Response] = []
    body = {"prompt": "Poison:", "request_id": "poison", "max_tokens": 900, "ignore_eos": True}

    def ask() -> None:
        with server.client() as http:
            answers.append(http.post("/v1/completions", json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(3):
        wait_until(lambda: server.metric("num_requests_running") == 1, 30)
        os.kill(server.engine_pid(), signal.SIGKILL)
        with server.client() as http:
            wait_until(lambda http=http: http.get("/health").status_code == 503, 10)
            wait_until(lambda http=http: http.get("/health").status_code == 200, 60)
    asking.join(60)

    assert answers[0].status_code == 500
    assert "'poison' crashed the engine" in answers[0].json()["error"]["message"]
    with server.client() as http:
        assert stream(http, {"prompt": "The capital of France is", **GREEDY}).startswith(" Paris")


@pytest.mark.slow
def test_hanging_engine_is_unhealthy_and_restarted(server: RunningServer) -> None:
    body = {"prompt": "Once upon a time there was a bear who", **GREEDY}
    with server.client() as http, server.client() as other:
        undisturbed = stream(http, body)
        unhealthy: list[float] = []

        def stop_at_10(num_chunks: int) -> None:
            if num_chunks == 10:
                os.kill(server.engine_pid(), signal.SIGSTOP)
                unhealthy.append(wait_until(lambda: other.get("/health").status_code == 503, 16))

        disturbed = stream(http, body, stop_at_10)

    assert disturbed == undisturbed
    assert 9 < unhealthy[0] < 15  # the deadline of a step is 10 s


def test_server_listens_while_it_loads(tmp_path) -> None:
    """Until the model is loaded it is not ready, and requests get a 503 to retry later."""
    import re
    import socket
    import subprocess
    import sys

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = make_model_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "portalm.cli.main", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "null", "--load-format", "dummy"], stdout=subprocess.PIPE, text=True
    )
    statuses, first_refusal = [], None
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    status = http.get("/health/ready").status_code
                    if status == 503 and first_refusal is None:
                        first_refusal = http.post("/v1/completions", json={"prompt": "w3"})
                except httpx.TransportError:
                    time.sleep(0.01)
                    continue
                statuses.append(status)
                if status == 200:
                    break
                time.sleep(0.01)  # a loaded machine needs its cores to load the model
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    assert statuses[-1] == 200
    assert statuses[0] == 503
    assert first_refusal is not None
    assert first_refusal.status_code == 503
    assert re.search("loaded", first_refusal.json()["error"]["message"])


def test_engine_killed_while_it_loads_is_restarted(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    with running_server(str(folder), "--load-format", "dummy", "--device", "null") as server:
        first = server.engine_pid()

        def is_another() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):  # no engine is running
                return server.engine_pid() != first
            return False

        os.kill(first, signal.SIGKILL)
        wait_until(is_another, 30)
        os.kill(server.engine_pid(), signal.SIGKILL)
        with server.client() as http:
            wait_until(lambda: server.metric("engine_restarts_total") == 1, 60)

            assert http.get("/health").status_code == 200
            assert stream(http, {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True})


@pytest.mark.chaos
def test_chaos() -> None:
    """100 streams, three crashes, some disconnects: all other clients get exactly their tokens."""
    num_streams, num_gone = 100, 12
    rng = random.Random(0)
    bodies = [
        {
            "prompt": f"{i} things that one should know about the number {i}:",
            "max_tokens": 24 + i % 17,
            "ignore_eos": True,
            "temperature": 0.0 if i % 2 else 0.9,
            "seed": i,
        }
        for i in range(num_streams)
    ]
    flags = ("--device", "cpu", "--max-model-len", "256", "--num-gpu-blocks-override", "220")
    with running_server(*flags) as server:
        results: dict[int, str] = {}
        failures: list[BaseException] = []

        def run(i: int, *, leaves: bool) -> None:
            try:
                with server.client() as http:
                    if not leaves:
                        results[i] = stream(http, bodies[i])
                        return
                    body = {**bodies[i], "stream": True}
                    with http.stream("POST", "/v1/completions", json=body) as response:
                        next(response.iter_lines())
            except BaseException as error:
                failures.append(error)

        def all_at_once(gone: set[int]) -> list[threading.Thread]:
            threads = [
                threading.Thread(target=run, args=(i,), kwargs={"leaves": i in gone})
                for i in range(num_streams)
            ]
            for thread in threads:
                thread.start()
            return threads

        for thread in all_at_once(set()):
            thread.join(300)
        expected, results = results, {}
        assert not failures
        assert len(expected) == num_streams

        gone = set(rng.sample(range(num_streams), num_gone))
        threads = all_at_once(gone)
        for _ in range(3):
            time.sleep(rng.uniform(0.5, 1.5))
            os.kill(server.engine_pid(), signal.SIGKILL)
            with server.client() as http:
                wait_until(lambda http=http: http.get("/health").status_code == 200, 60)
        for thread in threads:
            thread.join(300)

        assert not failures
        assert set(results) == set(range(num_streams)) - gone
        different = [i for i in results if results[i] != expected[i]]
        assert not different
        server.wait_for("num_requests_running", 0)
        server.wait_for("kv_cache_usage_perc", 0.0)
        assert server.metric("engine_restarts_total") == 3
