"""A request that ends engines is found, and no other pays for it."""

from __future__ import annotations

import random

import pytest

from portalm.engine.suspects import Suspects


def test_after_the_first_end_all_run_again() -> None:
    suspects = Suspects()
    open_ids = [f"r{i}" for i in range(10)]
    suspects.admit(open_ids)

    assert suspects.engine_crashed() == []
    assert suspects.admit(open_ids) == open_ids


def test_what_is_in_flight_is_not_sent_twice() -> None:
    suspects = Suspects()

    assert suspects.admit(["a", "b"]) == ["a", "b"]
    assert suspects.admit(["a", "b", "c"]) == ["c"]


@pytest.mark.parametrize("num_requests", [1, 2, 7, 100])
def test_the_one_that_ends_engines_is_found(num_requests: int) -> None:
    suspects = Suspects()
    open_ids = [f"r{i}" for i in range(num_requests)]
    guilty = random.Random(num_requests).choice(open_ids)
    blamed: list[str] = []
    for _ in range(20):
        suspects.admit(open_ids)
        while guilty not in suspects.in_flight:  # the others end well, and make room
            ended = sorted(suspects.in_flight)[0]
            suspects.ended(ended)
            open_ids.remove(ended)
            suspects.admit(open_ids)
        blamed = suspects.engine_crashed()
        if blamed:
            break

    assert blamed == [guilty]


@pytest.mark.parametrize("seed", range(20))
def test_engines_that_are_killed_from_outside_cost_no_request(seed: int) -> None:
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

    while open_ids:  # all get their turn
        ended = suspects.in_flight.copy()
        assert ended
        for one in ended:
            suspects.ended(one)
            open_ids.remove(one)
        suspects.admit(open_ids)


def test_when_the_suspects_are_gone_nothing_is_held_back() -> None:
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
