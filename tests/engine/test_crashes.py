"""An engine process that crashes: requests continue, and the reason reaches log and errors."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.output_processor import AnswerDelta
from portalm.errors import EngineDead
from portalm.sampling_params import SamplingParams
from tests.tiny import add_byte_tokenizer, make_config_folder

GPU_FAULT = "Memory access fault by GPU node-1 (Agent handle: 0x55) on address 0x7f01"
ABORTED = f"the engine process was ended by SIGABRT (abort): {GPU_FAULT}"


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """A tiny model on the null device."""
    folder = make_config_folder(tmp_path / "tiny", max_position_embeddings=32_000)
    add_byte_tokenizer(folder)
    return EngineConfig(model=str(folder), device="null", load_format="dummy")


def process_id(client: EngineClient) -> int:
    process = client._supervisor._process
    assert process is not None
    assert process._process is not None
    return process._process.pid


def crash(client: EngineClient, number: int, *, text: str = "") -> None:
    """Write `text` to the stderr of the engine process, then send it a signal."""
    pid = process_id(client)
    if text:
        with Path(f"/proc/{pid}/fd/2").open("w") as stderr:
            stderr.write(text + "\n")
    os.kill(pid, number)


def with_client(config: EngineConfig, test: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = EngineClient(config)
        try:
            await client.start()
            await asyncio.wait_for(test(client), 240)
        finally:
            await client.shutdown(at_once=True)

    asyncio.run(run())


async def answer(
    client: EngineClient, request_id: str, *, num_tokens: int, crashes: list[tuple[int, str]]
) -> AnswerDelta:
    """Generate; each engine crashes (signal, text on stderr) after its first delta.

    Returns the last delta.
    """
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    checked = await client.check(request_id, [1, 5, 6], params)
    num_engines, last = -1, None
    async for delta in client.generate([checked], params):
        last = delta
        if crashes and client.num_restarts > num_engines:
            num_engines = client.num_restarts
            number, text = crashes.pop(0)
            crash(client, number, text=text)
    assert last is not None
    return last


def test_reason_of_a_crash_reaches_log_health_check_and_client(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    seen: set[str | None] = set()

    async def watch_health(client: EngineClient) -> None:
        while True:
            seen.add(await client.health_problem())
            await asyncio.sleep(0.02)

    async def test(client: EngineClient) -> None:
        watching = asyncio.create_task(watch_health(client))
        crashes = [(signal.SIGSEGV, ""), (signal.SIGKILL, ""), (signal.SIGABRT, GPU_FAULT)]
        poison = await answer(client, "poison", num_tokens=30_000, crashes=crashes)
        assert poison.error is not None
        assert poison.error.startswith(f"request 'poison' crashed the engine repeatedly ({ABORTED}")
        good = await answer(client, "good", num_tokens=20, crashes=[])
        assert (good.finish_reason, good.error) == ("length", None)
        watching.cancel()
        assert await client.health_problem() is None

    with_client(config, test)

    assert any(f"is being restarted: {ABORTED}" in (problem or "") for problem in seen)
    reasons = [message for message in caplog.messages if "starting another engine" in message]
    assert [message[: message.index(": ")] for message in reasons] == [
        "the engine process was ended by SIGSEGV (segmentation fault)",
        "the engine process was ended by SIGKILL",
        "the engine process was ended by SIGABRT (abort)",
    ]
    assert re.search(r": in \w+ \(\w+\.py:\d+\): starting", reasons[0])  # the Python function
    assert "another process sent the signal" in reasons[1]
    assert GPU_FAULT in reasons[2]


def test_crash_before_the_model_is_loaded_is_reported_with_its_reason(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborts = tmp_path / "python"
    aborts.write_text(f"#!/bin/sh\necho '{GPU_FAULT}' >&2\nkill -ABRT $$\n")
    aborts.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(aborts))

    async def run() -> None:
        client = EngineClient(config)
        try:
            with pytest.raises(EngineDead) as caught:
                await client.start()
            assert str(caught.value).startswith(ABORTED)
            assert str(caught.value).endswith("before its model was loaded")
        finally:
            await client.shutdown(at_once=True)

    asyncio.run(run())
