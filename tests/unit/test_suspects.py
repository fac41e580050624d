"""The request that crashes engines is found, and no other fails."""

from __future__ import annotations

import random

import pytest

from portalm.engine.suspects import Suspects


def test_after_the_first_crash_all_requests_run_again() -> None:
    suspects = Suspects()
    open_ids = [f"r{i}" for i in range(10)]
    suspects.admit(open_ids)

    assert suspects.engine_crashed() == []
    assert suspects.admit(open_ids) == open_ids


def test_a_request_in_flight_is_not_sent_twice() -> None:
    suspects = Suspects()

    assert suspects.admit(["a", "b"]) == ["a", "b"]
    assert suspects.admit(["a", "b", "c"]) == ["c"]


@pytest.mark.parametrize("num_requests", [1, 2, 7, 100])
def test_the_request_that_crashes_engines_is_found(num_requests: int) -> None:
    suspects = Suspects()
    open_ids = [f"r{i}" for i in range(num_requests)]
    culprit = random.Random(num_requests).choice(open_ids)
    failed: list[str] = []
    for _ in range(20):
        suspects.admit(open_ids)
        while culprit not in suspects.in_flight:  # the others finish and make room
            ended = sorted(suspects.in_flight)[0]
            suspects.ended(ended)
            open_ids.remove(ended)
            suspects.admit(open_ids)
        failed = suspects.engine_crashed()
        if failed:
            break

    assert failed == [culprit]


@pytest.mark.parametrize("seed", range(20))
def test_engines_killed_from_outside_fail_no_request(seed: int) -> None:
    rng = random.Random(seed)
    suspects = Suspects()
    open_ids = [f"r{i}" for i in range(100)]
    suspects.admit(open_ids)
    for _ in range(3):
        for ended in rng.sample(sorted(suspects.in_flight), k=len(suspects.in_flight) // 4):
            suspects.ended(ended)
            open_ids.remove(ended)
        suspects.admit(open_ids)

        assert suspects.engine_crashed() == []
        suspects.admit(open_ids)

    while open_ids:  # all requests get to run
        ended = suspects.in_flight.copy()
        assert ended
        for one in ended:
            suspects.ended(one)
            open_ids.remove(one)
        suspects.admit(open_ids)


def test_without_suspects_no_request_is_held_back() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.admit(["a", "b"])
        suspects.engine_crashed()
    assert suspects.admit(["a", "b"]) == ["a"]
    assert suspects.held == ["b"]

    suspects.ended("a")

    assert suspects.admit(["b", "c"]) == ["b", "c"]
    suspects.ended("b")
    assert suspects.admit([f"d{i}" for i in range(5)]) == [f"d{i}" for i in range(5)]
