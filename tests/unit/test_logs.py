"""What log lines look like, and what they keep to themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from portalm.engine.messages import EngineStats
from portalm.errors import ConfigError
from portalm.logs import LogConfig, with_fields, write_logs
from portalm.server.observability.request_log import log_throughput, throughput

Read = Callable[[], str]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Read]:
    """Gives what was written to stderr; the logging of the test run is put back."""
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


def test_a_field_cannot_fake_a_line(written: Read) -> None:
    write_logs("server", LogConfig())

    logging.getLogger("portalm.x").info("request ended", extra=with_fields(id="a\nINFO b=c"))

    assert written().count("\n") == 1


def test_json_is_one_object_a_line_whatever_is_in_it(written: Read) -> None:
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


def test_libraries_are_heard_from_warnings_on(written: Read) -> None:
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


def test_throughput_is_of_the_time_between() -> None:
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


def test_without_traffic_no_throughput_is_logged(written: Read) -> None:
    write_logs("server", LogConfig())
    client = SimpleNamespace(stats=EngineStats())

    async def watch() -> list[int]:
        logging_task = asyncio.create_task(log_throughput(client, interval_s=0.01))
        counts = []
        for stats in (EngineStats(), EngineStats(num_running=1, steps_total=5), EngineStats()):
            client.stats = stats
            await asyncio.sleep(0.1)
            counts.append(written().count("\n"))
        await asyncio.sleep(0.1)
        counts.append(written().count("\n"))
        logging_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await logging_task
        return counts

    idle, busy, ended, still = asyncio.run(watch())

    assert idle == 0
    assert busy >= 1
    assert ended == busy + 1
    assert still == ended
