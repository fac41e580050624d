"""Random runs of the scheduler, with one and two steps in flight, and faults they must detect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from portalm.config import SchedulerConfig
from portalm.core import scheduler as scheduler_module
from portalm.core.block_manager import BlockManager
from portalm.core.plan import Failed, RequestUpdate, Sampled, StepPlan, StepResult
from portalm.core.prefix_cache import extend_hashes
from portalm.core.request import Request
from portalm.core.scheduler import Scheduler
from tests.unit.simulation import VOCAB_SIZE, Ask, Broken, Simulation, random_run


@pytest.mark.parametrize("max_in_flight", [1, 2], ids=["one step in flight", "two steps in flight"])
def test_random_runs_end_with_the_right_tokens_and_no_leak(max_in_flight: int) -> None:
    preemptions = hits = forks = 0
    reasons = set()
    for seed in range(50):
        simulation = random_run(
            seed, num_events=200, max_in_flight=max_in_flight, num_tenants=1 + seed % 2
        )
        stats = simulation.scheduler.stats()
        preemptions += int(stats["preemptions_total"])
        hits += int(stats["prefix_hits_total"])
        ended = simulation.finished.values()
        forks += sum(r.fork_of is not None and r.num_cached_tokens > 0 for r in ended)
        reasons |= {r.finish_reason for r in ended}
    # the runs must have covered these cases
    assert preemptions > 100
    assert hits > 5000
    assert forks > 300
    assert reasons == {"stop", "length", "abort", "error"}


@pytest.mark.slow
@pytest.mark.parametrize("max_in_flight", [1, 2], ids=["one step in flight", "two steps in flight"])
def test_many_more_random_runs(max_in_flight: int) -> None:
    for seed in range(1000, 3000):
        simulation = random_run(
            seed, num_events=300, max_in_flight=max_in_flight, num_tenants=1 + seed % 3
        )
        assert simulation.finished


class Simulations(RuleBasedStateMachine):
    """Hypothesis searches for the shortest run that breaks a rule."""

    @initialize(
        num_blocks=st.integers(18, 30),
        tokens=st.sampled_from([4, 9, 32]),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def start(self, num_blocks: int, tokens: int, caching: bool, policy: str) -> None:
        self.number = 0
        config = SchedulerConfig(
            max_batch_tokens=tokens,
            max_batch_requests=4,
            max_model_len=64,
            block_size=4,
            num_blocks=num_blocks,
            enable_prefix_caching=caching,
            policy=policy,
        )
        self.simulation = Simulation(config, Scheduler(config))

    @rule(
        length=st.integers(1, 40),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 20),
        num_answers=st.integers(1, 3),
        needs_history=st.booleans(),
        priority=st.integers(0, 1),
        breaks_after=st.none() | st.integers(0, 5),
    )
    def arrive(
        self,
        length: int,
        kind: int,
        max_tokens: int,
        num_answers: int,
        needs_history: bool,
        priority: int,
        breaks_after: int | None,
    ) -> None:
        self.number += 1
        for i in range(num_answers):
            self.simulation.add(
                Ask(
                    f"{self.number}-{i}",
                    [(kind * 7 + j * j) % VOCAB_SIZE for j in range(length)],
                    max_tokens,
                    seed=i,
                    priority=priority,
                    fork_of=f"{self.number}-{i - 1}" if i else None,
                    needs_history=needs_history,
                    breaks_after=breaks_after,
                )
            )

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.live))))

    @precondition(lambda self: len(self.simulation.in_flight) < 2)
    @rule()
    def dispatch(self) -> None:
        self.simulation.dispatch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def collect(self) -> None:
        self.simulation.collect()

    @precondition(lambda self: self.simulation.scheduler.running)
    @rule(data=st.data())
    def device_fails(self, data: st.DataObject) -> None:
        running = [r.request_id for r in self.simulation.scheduler.running]
        self.simulation.rewind(data.draw(st.sampled_from(running)))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish_all(2)


TestSimulations = Simulations.TestCase
TestSimulations.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


# -- planted faults ---------------------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]


def forks_write_without_a_copy(patch: pytest.MonkeyPatch) -> None:
    right = scheduler_module.blocks_to_fork

    def fault(parent: Request, block_size: int) -> tuple[list[int], int, None]:
        shared, num_computed, partial = right(parent, block_size)
        return shared + ([] if partial is None else [partial]), num_computed, None

    patch.setattr(scheduler_module, "blocks_to_fork", fault)


def forks_copy_blocks_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler_module, "is_prompt_computed", lambda parent, plan: parent.block_table)


def blocks_are_found_before_they_are_full(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._publish

    def fault(self: Scheduler, request: Request) -> None:
        num_computed = request.num_computed_tokens
        num_held = len(request.block_table) * self.config.block_size
        request.num_computed_tokens = min(request.num_tokens, num_held)
        right(self, request)
        request.num_computed_tokens = num_computed

    patch.setattr(Scheduler, "_publish", fault)


def evicted_blocks_are_still_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_forget", lambda self, block: None)


def salts_are_ignored(patch: pytest.MonkeyPatch) -> None:
    def fault(self: Scheduler, request: Request) -> None:
        size = self.config.block_size
        extend_hashes(request.block_hashes, request.token_ids, salt="", block_size=size)

    patch.setattr(Scheduler, "_extend_hashes", fault)


def hits_include_the_token_after_them(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._find_cached

    def fault(self: Scheduler, request: Request) -> tuple[list[int], int, None]:
        found, num_computed, copy = right(self, request)
        return found, min(num_computed + bool(found), request.num_tokens - 1), copy

    patch.setattr(Scheduler, "_find_cached", fault)


def aborted_requests_keep_their_blocks(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._end

    def fault(self: Scheduler, request: Request, reason: str) -> None:
        if reason == "abort":
            request.block_table = []
        right(self, request, reason)

    patch.setattr(Scheduler, "_end", fault)


def blocks_are_freed_twice(patch: pytest.MonkeyPatch) -> None:
    right = BlockManager.release

    def fault(self: BlockManager, table: list[int]) -> None:
        copy = table[:1]
        right(self, table)
        right(self, copy)

    patch.setattr(BlockManager, "release", fault)


def outcomes_of_another_epoch_are_applied(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._requeue

    def fault(self: Scheduler, request: Request) -> None:
        right(self, request)
        request.epoch -= 1

    patch.setattr(Scheduler, "_requeue", fault)


def rows_of_preempted_requests_are_not_released(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._requeue

    def fault(self: Scheduler, request: Request) -> None:
        right(self, request)
        self._released.pop()

    patch.setattr(Scheduler, "_requeue", fault)


def the_first_request_loses_its_blocks(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._preempt

    def fault(self: Scheduler, victim: Request, plan: object) -> None:
        self.running.insert(len(self.running), self.running.pop(0))
        right(self, self.running[-1], plan)  # type: ignore[arg-type]

    patch.setattr(Scheduler, "_preempt", fault)


def broken_logits_count_as_tokens(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler.update

    def fault(self: Scheduler, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        outcomes = [Sampled([0]) if isinstance(o, Failed) else o for o in result.outcomes]
        return right(self, plan, StepResult(outcomes, result.prompt_logprobs))

    patch.setattr(Scheduler, "update", fault)


FAULTS: dict[Fault, str] = {
    forks_write_without_a_copy: "two requests write to one block|wrong token",
    forks_copy_blocks_before_they_are_computed: "wrong token",
    blocks_are_found_before_they_are_full: "not full|several prefixes|misnamed",
    evicted_blocks_are_still_found: "cached|misnamed|several prefixes",
    salts_are_ignored: "misnamed|wrong token",
    hits_include_the_token_after_them: "wrong token|cached tokens",
    aborted_requests_keep_their_blocks: "holders",
    blocks_are_freed_twice: "holders",
    outcomes_of_another_epoch_are_applied: "answered|expected|samples_token",
    rows_of_preempted_requests_are_not_released: "row was not released",
    the_first_request_loses_its_blocks: "the first lost its blocks",
    broken_logits_count_as_tokens: "expected|wrong token",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.replace("_", " "))
def test_a_planted_fault_is_detected(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)

    with pytest.raises(Broken, match=FAULTS[fault]):
        for seed in range(36, 80):  # 36: the rarest fault is detected soon
            random_run(seed, num_events=200, max_in_flight=2)
