"""The client detects an overdue engine from shared memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from portalm.engine.pulse import DEADLINE_S, Pulse


@pytest.fixture
def pulses(tmp_path: Path) -> tuple[Pulse, Pulse]:
    """The engine's pulse and the client's, of the same file."""
    return Pulse(tmp_path / "pulse"), Pulse(tmp_path / "pulse")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_the_client_reads_what_the_engine_writes(pulses, monkeypatch) -> None:
    engine, client = pulses
    clock = Clock(monkeypatch)

    engine.begin(300)
    reading = client.read()

    assert (reading.num_steps, reading.since, reading.num_tokens) == (1, clock.now, 300)
    engine.end()
    assert client.read().num_tokens == 0


def test_an_idle_engine_is_never_overdue(pulses, monkeypatch) -> None:
    engine, client = pulses
    clock = Clock(monkeypatch)
    engine.begin(1)
    engine.end()

    clock.now += 10_000

    assert client.read().overdue_s(work_since=None) <= 0
    # work that has just arrived: the deadline counts from then
    assert client.read().overdue_s(work_since=clock.now) <= 0
    clock.now += DEADLINE_S + 1
    assert client.read().overdue_s(work_since=clock.now - DEADLINE_S - 1) == pytest.approx(1)


def test_a_small_step_that_hangs_is_overdue(pulses, monkeypatch) -> None:
    engine, client = pulses
    clock = Clock(monkeypatch)
    engine.begin(8)

    clock.now += DEADLINE_S
    assert client.read().overdue_s(work_since=1000.0) < 0
    clock.now += 1

    assert 0 < client.read().overdue_s(work_since=1000.0) < 5


def test_a_prefill_of_30_s_is_not_overdue(pulses, monkeypatch) -> None:
    engine, client = pulses
    clock = Clock(monkeypatch)
    engine.begin(2048)

    clock.now += 30

    assert client.read().overdue_s(work_since=1000.0) < 0


def test_the_deadline_grows_on_a_slow_device(pulses, monkeypatch) -> None:
    engine, client = pulses
    clock = Clock(monkeypatch)
    engine.begin(100)
    clock.now += 20  # 0.2 s per token
    engine.end()

    engine.begin(100)
    clock.now += 150

    assert client.read().overdue_s(work_since=1000.0) < 0
