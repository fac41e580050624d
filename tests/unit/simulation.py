"""A device made of a dictionary, under the real scheduler: what each slot was written with.

Every slot remembers the digest of all tokens up to its own, so that reading back what a request
would attend to shows a wrong block table, a missing copy, a stale or foreign block, and a token
that was never computed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from portalm.config import SchedulerConfig
from portalm.core.plan import StepPlan, StepResult
from portalm.core.request import Request, RequestStatus
from portalm.core.scheduler import Scheduler
from portalm.sampling_params import SamplingParams

VOCAB_SIZE = 50


class Broken(AssertionError):
    """The scheduler broke a rule."""


def digest(before: int, token_id: int) -> int:
    return hash((before, token_id))


def next_token(prefix: int) -> int:
    """What the model says behind a prefix of this digest."""
    return prefix % VOCAB_SIZE


def chain(token_ids: Sequence[int]) -> list[int]:
    """The digest of every prefix."""
    found, value = [], 0
    for token_id in token_ids:
        value = digest(value, token_id)
        found.append(value)
    return found


def expected_answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    known = list(prompt)
    value = chain(known)[-1]
    for _ in range(num_tokens):
        known.append(next_token(value))
        value = digest(value, known[-1])
    return known[len(prompt) :]


class Simulation:
    """A scheduler, its device, and steps in flight between them."""

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler | None = None) -> None:
        self.scheduler = scheduler or Scheduler(config)
        self.config = config
        self.memory: dict[int, int] = {}
        self.in_flight: list[tuple[StepPlan, StepResult]] = []
        self.prompts: dict[str, list[int]] = {}
        self.max_tokens: dict[str, int] = {}
        self.live: dict[str, Request] = {}
        self.drawn: dict[str, list[int]] = {}
        """Tokens as the device drew them, by request: ahead of what the host knows."""
        self.finished: dict[str, Request] = {}
        self.num_steps = 0

    # -- what happens -------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        *,
        priority: int = 0,
        salt: str = "",
        fork_of: str | None = None,
        needs_history: bool = False,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, repetition_penalty=1.5 if needs_history else 1.0
        )
        request = Request(
            request_id,
            prompt,
            params,
            seed=0,
            max_total_tokens=len(prompt) + max_tokens,
            priority=priority,
            cache_salt=salt,
            fork_of=fork_of,
        )
        self.scheduler.add(request)
        self.prompts[request_id], self.max_tokens[request_id] = prompt, max_tokens
        self.live[request_id] = request

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        if request is not None:
            self._take_out(request)
        self.check()

    def dispatch(self) -> bool:
        """Plan a step and run it on the device; its result stays in flight."""
        plan = self.scheduler.schedule()
        self.check()
        if plan.is_empty:
            return False
        self.in_flight.append((plan, self._run(plan)))
        self.num_steps += 1
        return True

    def collect(self) -> None:
        """The oldest step's result reaches the host."""
        plan, result = self.in_flight.pop(0)
        for update in self.scheduler.update(plan, result):
            if update.finish_reason is not None:
                self._take_out(update.request)
        self.check()

    def rewind(self, request_id: str) -> None:
        """The device failed: all that is in flight is lost."""
        self.in_flight.clear()
        self.memory.clear()
        for update in self.scheduler.rewind({request_id: "it broke"}):
            self._take_out(update.request)
        self.check()

    def finish_all(self, max_in_flight: int = 1) -> None:
        """Run until nothing is left; a scheduler that makes no progress is found out."""
        limit = (
            self.num_steps
            + 200
            + sum(50 * (len(self.prompts[r]) + self.max_tokens[r]) for r in self.live)
        )
        while self.scheduler.has_unfinished() or self.in_flight:
            moved = False
            while len(self.in_flight) < max_in_flight and self.dispatch():
                moved = True
            if self.in_flight:
                self.collect()
                moved = True
            if not moved or self.num_steps > limit:
                raise Broken(f"no progress: {self.scheduler.running}, {self.live}")
        if self.scheduler.blocks.num_held:
            raise Broken(f"{self.scheduler.blocks.num_held} blocks leaked")

    def _take_out(self, request: Request) -> None:
        del self.live[request.request_id]
        self.finished[request.request_id] = request
        answer = request.output_token_ids
        expected = expected_answer(self.prompts[request.request_id], len(answer))
        if answer != expected:
            raise Broken(f"{request}: answered {answer}, expected {expected}")
        if request.finish_reason == "length" and len(answer) != self.max_tokens[request.request_id]:
            raise Broken(f"{request}: ended after {len(answer)} tokens")

    # -- the device ---------------------------------------------------------------------------

    def _run(self, plan: StepPlan) -> StepResult:
        size = self.config.block_size
        written = {
            dst * size + i: self.memory.get(src * size + i)
            for src, dst in plan.block_copies
            for i in range(size)
        }
        for slot, value in written.items():
            self._put(slot, value)
        if plan.num_tokens != sum(p.num_tokens for p in plan.requests):
            raise Broken("the plan's tokens do not add up")
        if plan.num_tokens > self.config.max_batch_tokens:
            raise Broken(f"{plan.num_tokens} tokens in one step")
        ends: list[tuple[Request, int, bool, list[int]]] = []
        for planned in plan.requests:  # all write before any reads, as layers do
            request = planned.request
            tokens = self._tokens(request)
            end = planned.start + planned.num_tokens
            if end > len(tokens):
                raise Broken(f"{request}: token {end - 1} is computed before it is drawn")
            digests = chain(tokens[:end])
            for position in range(planned.start, end):
                self._put(self._slot(request, position), digests[position])
            ends.append((request, end, planned.draws_token, digests))
        token_ids = []
        for request, end, draws, digests in ends:
            seen = [self.memory.get(self._slot(request, p)) for p in range(end)]
            if seen != digests:
                wrong = next(p for p in range(end) if seen[p] != digests[p])
                raise Broken(f"{request}: would attend to a wrong token at position {wrong}")
            token_id = next_token(digests[-1]) if draws else -1
            if draws:
                self.drawn[request.request_id] = [*self._tokens(request)[:end], token_id]
            token_ids.append(token_id)
        return StepResult(token_ids=token_ids)

    def _tokens(self, request: Request) -> list[int]:
        """All tokens of a request that the device has or was told."""
        drawn = self.drawn.get(request.request_id, [])
        known = request.token_ids
        return drawn if len(drawn) > len(known) else known

    def _slot(self, request: Request, position: int) -> int:
        size = self.config.block_size
        return request.block_table[position // size] * size + position % size

    def _put(self, slot: int, value: int | None) -> None:
        if slot < self.config.block_size:
            raise Broken("the null block was written")
        self.memory[slot] = value if value is not None else -1

    # -- what must hold -----------------------------------------------------------------------

    def check(self) -> None:
        """Every block has as many holders as tables hold it, and none is lost."""
        blocks, config = self.scheduler.blocks, self.config
        held = Counter(b for r in self.scheduler.running for b in r.block_table)
        for block in range(1, config.num_blocks):
            if blocks.num_holders(block) != held[block]:
                raise Broken(
                    f"block {block}: {blocks.num_holders(block)} holders, {held[block]} tables"
                )
        if blocks.num_unheld + len(held) != config.num_blocks - 1:
            raise Broken("a block is neither held nor free")
        if not 0 <= blocks.num_cached <= blocks.num_unheld:
            raise Broken(f"{blocks.num_cached} cached of {blocks.num_unheld}")
        for request in self.scheduler.running:
            if request.status is not RequestStatus.RUNNING or len(set(request.block_table)) != len(
                request.block_table
            ):
                raise Broken(f"{request} is not as a running request should be")
        if len(self.scheduler.running) > config.max_batch_requests:
            raise Broken("too many requests run")


def random_life(
    seed: int, *, num_events: int, max_in_flight: int, scheduler_class: type[Scheduler] = Scheduler
) -> Simulation:
    """Arrivals, aborts, forks, failures and steps at random, then the end of all requests."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        max_batch_tokens=rng.choice([4, 16, 40]),
        max_batch_requests=4,
        max_model_len=64,
        block_size=4,
        num_blocks=rng.choice([18, 24, 40]),
        enable_prefix_caching=rng.random() < 0.8,
        policy=rng.choice(["fcfs", "priority"]),
    )
    simulation = Simulation(config, scheduler_class(config))
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(3)]
    for number in range(num_events):
        event = rng.random()
        if event < 0.25:
            prompt = rng.choice(beginnings)[: rng.randrange(1, 40)]
            prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(3))]
            options = {"priority": rng.randrange(3), "salt": rng.choice(["", "", "other"])}
            max_tokens = rng.randrange(1, 20)
            history = rng.random() < 0.2
            for i in range(rng.choice([1, 1, 1, 3])):
                simulation.add(
                    f"{number}-{i}",
                    prompt,
                    max_tokens,
                    fork_of=f"{number}-0" if i else None,
                    needs_history=history,
                    **options,
                )
        elif event < 0.30 and simulation.live:
            simulation.abort(rng.choice(sorted(simulation.live)))
        elif event < 0.31 and simulation.scheduler.running:
            simulation.rewind(rng.choice(simulation.scheduler.running).request_id)
        elif len(simulation.in_flight) < max_in_flight and rng.random() < 0.7:
            simulation.dispatch()
        elif simulation.in_flight:
            simulation.collect()
    simulation.finish_all(max_in_flight)
    return simulation
