"""Thousands of random lives of requests, in turn and one step ahead; and faults that must show."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from portalm.config import SchedulerConfig
from portalm.core.block_manager import BlockManager
from portalm.core.request import Request
from portalm.core.scheduler import Scheduler
from tests.unit.simulation import VOCAB_SIZE, Broken, Simulation, random_life


@pytest.mark.parametrize("max_in_flight", [1, 2], ids=["in turn", "one ahead"])
def test_random_lives_end_with_the_right_tokens_and_no_leak(max_in_flight: int) -> None:
    preemptions = hits = forks = 0
    for seed in range(150):
        life = random_life(seed, num_events=200, max_in_flight=max_in_flight)
        stats = life.scheduler.stats()
        preemptions += int(stats["preemptions_total"])
        hits += int(stats["prefix_hits_total"])
        forks += sum(
            r.fork_of is not None and r.num_cached_tokens > 0 for r in life.finished.values()
        )
    # the lives must have met what they are about
    assert preemptions > 100
    assert hits > 1000
    assert forks > 100


@pytest.mark.slow
@pytest.mark.parametrize("max_in_flight", [1, 2], ids=["in turn", "one ahead"])
def test_many_more_random_lives(max_in_flight: int) -> None:
    for seed in range(1000, 6000):
        random_life(seed, num_events=300, max_in_flight=max_in_flight)


class Lives(RuleBasedStateMachine):
    """Hypothesis looks for the shortest life that breaks a rule."""

    @initialize(
        num_blocks=st.integers(18, 30), tokens=st.sampled_from([4, 9, 32]), caching=st.booleans()
    )
    def start(self, num_blocks: int, tokens: int, caching: bool) -> None:
        self.number = 0
        self.simulation = Simulation(
            SchedulerConfig(
                max_batch_tokens=tokens,
                max_batch_requests=4,
                max_model_len=64,
                block_size=4,
                num_blocks=num_blocks,
                enable_prefix_caching=caching,
            )
        )

    @rule(
        length=st.integers(1, 40),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 20),
        answers=st.integers(1, 3),
        history=st.booleans(),
    )
    def arrive(self, length: int, kind: int, max_tokens: int, answers: int, history: bool) -> None:
        self.number += 1
        prompt = [(kind * 7 + i * i) % VOCAB_SIZE for i in range(length)]
        for i in range(answers):
            self.simulation.add(
                f"{self.number}-{i}",
                prompt,
                max_tokens,
                fork_of=f"{self.number}-0" if i else None,
                needs_history=history,
            )

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @precondition(lambda self: len(self.simulation.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        self.simulation.dispatch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def news(self) -> None:
        self.simulation.collect()

    @precondition(lambda self: self.simulation.scheduler.running)
    @rule(data=st.data())
    def device_fails(self, data: st.DataObject) -> None:
        running = [r.request_id for r in self.simulation.scheduler.running]
        self.simulation.rewind(data.draw(st.sampled_from(running)))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish_all(2)


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


# -- planted faults ---------------------------------------------------------------------------


class NoCopy(Scheduler):
    """Forks share the block they write to, without a copy."""

    def _blocks_to_fork(self, request, parent):  # type: ignore[no-untyped-def]
        shared, num_computed, _ = super()._blocks_to_fork(request, parent)
        return shared, num_computed, None


class TooEarly(Scheduler):
    """Blocks are found before all their tokens are computed."""

    def _publish(self, request: Request) -> None:
        computed, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
        num_held = len(request.block_table) * self.config.block_size
        request.num_computed_tokens = min(request.num_computed_tokens, num_held)
        super()._publish(request)
        request.num_computed_tokens = computed


class LeakOnAbort(Scheduler):
    """An aborted request keeps its blocks."""

    def _finish(self, request, reason):  # type: ignore[no-untyped-def]
        if reason == "abort":
            request.block_table = []
        super()._finish(request, reason)


class NoEpoch(Scheduler):
    """Results of a preempted request are taken as if nothing had happened."""

    def _requeue(self, request: Request) -> None:
        super()._requeue(request)
        request.epoch -= 1


class HitTooLong(Scheduler):
    """A hit takes one block more than is there."""

    def _find_cached(self, request):  # type: ignore[no-untyped-def]
        found, num_computed, copy = super()._find_cached(request)
        return found, min(num_computed + bool(found), request.num_tokens - 1), copy


@pytest.mark.parametrize("fault", [NoCopy, TooEarly, LeakOnAbort, NoEpoch, HitTooLong])
def test_a_planted_fault_shows(fault: type[Scheduler]) -> None:
    with pytest.raises((Broken, AssertionError, KeyError, IndexError, ValueError)):
        for seed in range(300):
            random_life(seed, num_events=200, max_in_flight=2, scheduler_class=fault)


def test_a_double_free_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockManager.release

    def twice(self: BlockManager, table: list[int]) -> None:
        copy = list(table)
        release(self, table)
        if copy:
            release(self, copy[:1])

    monkeypatch.setattr(BlockManager, "release", twice)
    with pytest.raises((Broken, KeyError, AssertionError)):
        random_life(0, num_events=200, max_in_flight=1)
