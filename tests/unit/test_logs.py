"""Format of log lines, and the throughput line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from portalm.engine.messages import EngineStats
from portalm.errors import ConfigError
from portalm.logs import LogConfig, with_fields, write_logs
from portalm.server.observability.request_log import log_throughput, throughput

Read = Callable[[], str]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Read]:
    """Return a function that reads stderr; restore the logging of the test run afterwards."""
    root, own, backends = map(logging.getLogger, (None, "portalm", "portalm_backends"))
    handlers, levels = root.handlers[:], [one.level for one in (root, own, backends)]
    text: list[str] = []

    def read() -> str:
        text.append(capsys.readouterr().err)
        return "".join(text)

    yield read
    root.handlers[:] = handlers
    for one, level in zip((root, own, backends), levels, strict=True):
        one.setLevel(level)


def test_text_has_time_level_process_message_and_fields(written: Read) -> None:
    write_logs("server", LogConfig())

    logging.getLogger("portalm.x").info("request ended", extra=with_fields(id="r 1", s=0.25, n=3))

    date, time, rest = written().split(" ", 2)
    assert (len(date), len(time)) == (10, 12)
    assert rest == 'INFO server: request ended id="r 1" s=0.250 n=3\n'


def test_a_field_cannot_forge_a_line(written: Read) -> None:
    write_logs("server", LogConfig())

    logging.getLogger("portalm.x").info("request ended", extra=with_fields(id="a\nINFO b=c"))

    assert written().count("\n") == 1


def test_json_is_one_object_per_line_for_any_content(written: Read) -> None:
    write_logs("engine", LogConfig(format="json"))
    logger = logging.getLogger("portalm.engine.x")

    logger.info("one %s", "more", extra=with_fields(text='\ud800 " \n', none=None, path={1}))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it failed")

    first, second = map(json.loads, written().splitlines())
    assert first["time"].endswith("Z")
    del first["time"]
    assert first == {
        "level": "info",
        "process": "engine",
        "logger": "portalm.engine.x",
        "message": "one more",
        "text": '\ud800 " \n',
        "path": "{1}",
    }
    assert second["message"] == "it failed"
    assert "two\nlines" in second["exception"]


def test_libraries_log_from_warning_on(written: Read) -> None:
    write_logs("server", LogConfig(level="error"))

    logging.getLogger("httpx").info("GET /")
    logging.getLogger("httpx").warning("slow")
    logging.getLogger("portalm.x").warning("not shown")

    assert written().endswith("server: slow\n")
    assert written().count("\n") == 1


def test_an_unknown_format_or_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="log format must be one of text, json, not 'xml'"):
        LogConfig(format="xml")
    with pytest.raises(ConfigError, match="log level"):
        LogConfig(level="loud")


def test_throughput_is_computed_between_two_readings() -> None:
    before = EngineStats(generation_tokens_total=100, prefix_queries_total=50, prefix_hits_total=50)
    after = EngineStats(
        num_running=3,
        num_waiting=2,
        num_blocks=10,
        num_used_blocks=4,
        prompt_tokens_total=50,
        generation_tokens_total=300,
        prefix_queries_total=90,
        prefix_hits_total=60,
        preemptions_total=1,
    )

    assert throughput(before, after, seconds=10.0) == {
        "running": 3,
        "waiting": 2,
        "kv_used": 0.4,
        "prompt_tokens_per_s": 5.0,
        "generated_tokens_per_s": 20.0,
        "prefix_hit_rate": 0.25,
        "preemptions": 1,
    }


class PolledClient:
    """A client whose statistics change after every third reading."""

    def __init__(self, *phases: EngineStats) -> None:
        self._phases = [stats for stats in phases for _ in range(3)]
        self.is_exhausted = asyncio.Event()

    @property
    def stats(self) -> EngineStats:
        if len(self._phases) == 1:
            self.is_exhausted.set()
            return self._phases[0]
        return self._phases.pop(0)


def test_throughput_is_logged_during_traffic_and_once_after_it(written: Read) -> None:
    write_logs("server", LogConfig())
    busy, ended = EngineStats(num_running=1, steps_total=5), EngineStats(steps_total=5)

    async def log() -> None:
        client = PolledClient(EngineStats(), busy, ended)
        logging_task = asyncio.create_task(log_throughput(client, interval_s=0.001))
        await asyncio.wait_for(client.is_exhausted.wait(), 60)
        logging_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await logging_task

    asyncio.run(log())

    lines = written().splitlines()
    assert len(lines) == 4
    assert [f" running={n} " in line for n, line in zip((1, 1, 1, 0), lines, strict=True)] == [
        True
    ] * 4
