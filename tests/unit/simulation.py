"""The real scheduler over a simulated device that records what each slot was written with.

Every slot stores the digest of all tokens up to its own. Reading the slots that a request attends
to therefore reveals a wrong block table, a missing copy, a stale or foreign block, and a token that
was never computed. The model samples a token from that digest and the request's seed, so that every
answer is known in advance.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from portalm.config import SchedulerConfig
from portalm.core.plan import (
    Failed,
    Outcome,
    PlannedRequest,
    RequestUpdate,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from portalm.core.prefix_cache import block_hash, root_hash
from portalm.core.request import FinishReason, Request, RequestStatus
from portalm.core.scheduler import Scheduler
from portalm.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 49


class Broken(AssertionError):
    """The scheduler broke a rule."""


def require(is_so: bool, problem: str, *about: object) -> None:
    """Raise `Broken` unless `is_so`. The text is formatted only then: this is called often."""
    if not is_so:
        raise Broken(problem.format(*about))


# -- the model --------------------------------------------------------------------------------


def root(salt: str) -> int:
    """The digest before the first token: contexts with different salts share no slot."""
    return zlib.crc32(salt.encode())


def digest(before: int, token_id: int) -> int:
    return hash((before, token_id))


def chain(token_ids: Sequence[int], salt: str) -> list[int]:
    """The digest of every prefix."""
    found, value = [], root(salt)
    for token_id in token_ids:
        value = digest(value, token_id)
        found.append(value)
    return found


def next_token(prefix: int, seed: int) -> int:
    """The token that the model samples after a prefix with this digest."""
    return hash((prefix, seed)) % VOCAB_SIZE


@dataclass
class Ask:
    """A request as its user sends it."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    seed: int = 0
    priority: int = 0
    salt: str = ""
    fork_of: str | None = None
    needs_history: bool = False
    prompt_logprobs: bool = False
    min_tokens: int = 0
    tenant: str = ""
    num_known: int = 0
    """Tokens of the answer that the user already has (the request is resumed)."""
    breaks_after: int | None = None
    """The logits after this many tokens of the answer are NaN."""

    def answer(self) -> tuple[list[int], FinishReason]:
        """The expected answer and finish reason, unless it is aborted."""
        known: list[int] = []
        value = chain(self.prompt, self.salt)[-1]
        while True:
            if self.breaks_after is not None and len(known) >= max(
                self.breaks_after, self.num_known
            ):
                return known, "error"
            token_id = next_token(value, self.seed)
            known.append(token_id)
            value = digest(value, token_id)
            if token_id == EOS and len(known) > self.min_tokens and len(known) > self.num_known:
                return known, "stop"
            if len(known) == self.max_tokens:
                return known, "length"

    def request(self) -> Request:
        return Request(
            self.request_id,
            self.prompt,
            SamplingParams(
                max_tokens=self.max_tokens,
                min_tokens=self.min_tokens,
                repetition_penalty=1.5 if self.needs_history else 1.0,
                prompt_logprobs=0 if self.prompt_logprobs else None,
            ),
            seed=self.seed,
            max_total_tokens=len(self.prompt) + self.max_tokens,
            eos_token_ids=[EOS],
            priority=self.priority,
            cache_salt=self.salt,
            tenant=self.tenant,
            output_token_ids=self.answer()[0][: self.num_known],
            fork_of=self.fork_of,
        )


# -- the device -------------------------------------------------------------------------------


class Device:
    """Runs each plan as soon as it is dispatched."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory: dict[int, int] = {}
        self._tokens_before: dict[int, tuple[int, int]] = {}
        """By digest of a prefix: digest of the prefix without its last token, and that token."""
        self._names: dict[int, tuple[bytes, list[int]]] = {}
        self._sampled: dict[str, tuple[Request, int, int]] = {}
        """By request id: request, position and token that the last step sampled."""
        self._rows: dict[str, tuple[Request, int]] = {}
        """Requests, and their epoch, for which the runner has a row."""

    def run(self, plan: StepPlan, asks: dict[str, Ask]) -> StepResult:
        self._assign_rows(plan)
        self._copy(plan.block_copies)
        chains: list[list[int]] = []
        writers: dict[int, Request] = {}
        for planned in plan.requests:  # every request writes before any reads, as in a layer
            ask = asks[planned.request.request_id]
            digests = chain(self._tokens(planned, ask), ask.salt)
            for position in range(planned.start, len(digests)):
                slot = self._slot(planned.request, position)
                writer = writers.setdefault(slot // self.config.block_size, planned.request)
                require(writer is planned.request, "two requests write to one block")
                before = digests[position - 1] if position else root(ask.salt)
                self._put(slot, digests[position])
                self._tokens_before[digests[position]] = before, self._token(planned, position)
            chains.append(digests)
        result = StepResult(outcomes=[])
        sampled: dict[str, tuple[Request, int, int]] = {}
        for index, (planned, digests) in enumerate(zip(plan.requests, chains, strict=True)):
            self._attend(planned.request, digests)
            result.outcomes.append(self._sample(planned, digests, asks, sampled))
            self._score_prompt(index, planned, result)
        self._sampled = sampled
        return result

    def lose_all(self) -> None:
        self.memory.clear()
        self._sampled.clear()

    def _assign_rows(self, plan: StepPlan) -> None:
        """Give each request a row, kept until a plan releases it, as the runner does."""
        self.forget(plan.released)
        for planned in plan.requests:
            row = (planned.request, planned.epoch)
            known = self._rows.setdefault(planned.request.request_id, row)
            require(
                known == row,
                "{} stopped and runs again, but its row was not released",
                planned.request,
            )
        require(len(self._rows) <= self.config.max_batch_requests, "more rows than may run")

    def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._rows.pop(request_id, None)

    def _copy(self, block_copies: list[tuple[int, int]]) -> None:
        size = self.config.block_size
        before = dict(self.memory)  # all copies read the state before the step
        for source, destination in block_copies:
            for i in range(size):
                self._put(destination * size + i, before.get(source * size + i, -1))

    def _token(self, planned: PlannedRequest, position: int) -> int:
        request = planned.request
        if position < len(request.token_ids):
            return request.token_ids[position]
        require(
            not request.needs_history, "{} was planned before its last token was known", request
        )
        sampled = self._sampled.get(request.request_id)
        require(
            sampled is not None and sampled[:2] == (request, position),
            "{}: token {} is computed, but the previous step did not sample it",
            request,
            position,
        )
        assert sampled is not None
        return sampled[2]

    def _tokens(self, planned: PlannedRequest, ask: Ask) -> list[int]:
        """Tokens 0 to the end of the planned ones, including those still on the device."""
        request, end = planned.request, planned.start + planned.num_tokens
        tokens = [self._token(planned, i) for i in range(min(end, len(request.token_ids) + 1))]
        require(len(tokens) == end, "{}: computed past the sampled tokens", request)
        require(end < len(ask.prompt) + ask.max_tokens, "{}: computed past its end", request)
        return tokens

    def _slot(self, request: Request, position: int) -> int:
        size = self.config.block_size
        return request.block_table[position // size] * size + position % size

    def _put(self, slot: int, value: int) -> None:
        require(slot >= self.config.block_size, "the null block was written")
        self.memory[slot] = value

    def _attend(self, request: Request, digests: list[int]) -> None:
        for position, expected in enumerate(digests):
            if self.memory.get(self._slot(request, position)) != expected:
                raise Broken(f"{request}: would attend to a wrong token at position {position}")

    @staticmethod
    def _sample(
        planned: PlannedRequest,
        digests: list[int],
        asks: dict[str, Ask],
        sampled: dict[str, tuple[Request, int, int]],
    ) -> Outcome | None:
        if not planned.samples_token:
            return None
        request = planned.request
        ask = asks[request.request_id]
        if ask.breaks_after is not None and len(digests) - len(ask.prompt) >= ask.breaks_after:
            sampled[request.request_id] = request, len(digests), -1
            return Failed("NaN")
        token_id = next_token(digests[-1], ask.seed)
        sampled[request.request_id] = request, len(digests), token_id
        return Sampled([token_id])

    @staticmethod
    def _score_prompt(index: int, planned: PlannedRequest, result: StepResult) -> None:
        request = planned.request
        if request.params.prompt_logprobs is not None:
            result.prompt_logprobs[index] = [
                TokenLogprobs(request.token_ids[planned.start + i + 1], -1.0, 1, [])
                for i in range(planned.num_prompt_rows)
            ]

    def name_of(self, block: int, salts: dict[int, str]) -> bytes:
        """The digest that the prefix cache should have for the contents of `block`."""
        size = self.config.block_size
        found = [self.memory.get(block * size + i, -1) for i in range(size)]
        if found[-1] not in self._names:
            self._names[found[-1]] = self._name_of_prefix(found[-1], salts)
        name, expected = self._names[found[-1]]
        require(found == expected, "block {} has tokens of several prefixes", block)
        return name

    def _name_of_prefix(self, value: int, salts: dict[int, str]) -> tuple[bytes, list[int]]:
        """The cache digest of the prefix with digest `value`, and the digests in its last block."""
        size = self.config.block_size
        tokens: list[int] = []
        while value not in salts:
            require(value in self._tokens_before, "a block was found that is not full")
            value, token_id = self._tokens_before[value]
            tokens.append(token_id)
        tokens.reverse()
        require(len(tokens) % size == 0, "a block was found that is not full")
        name = root_hash(salts[value])
        for start in range(0, len(tokens), size):
            name = block_hash(name, tokens[start : start + size])
        return name, chain(tokens, salts[value])[-size:]


# -- scheduler and device together ------------------------------------------------------------


@dataclass
class Simulation:
    """A scheduler, its device, and the steps in flight between them."""

    config: SchedulerConfig
    scheduler: Scheduler
    asks: dict[str, Ask] = field(default_factory=dict)
    live: dict[str, Request] = field(default_factory=dict)
    finished: dict[str, Request] = field(default_factory=dict)
    in_flight: list[tuple[StepPlan, StepResult]] = field(default_factory=list)
    scored: dict[str, dict[int, int]] = field(default_factory=dict)
    """By request id: prompt tokens whose logprobs were reported, by index."""
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.device = Device(self.config)
        self.salts = {root(""): ""}

    # -- events -------------------------------------------------------------------------------

    def add(self, ask: Ask) -> None:
        request = ask.request()
        self.scheduler.add(request)
        self.asks[ask.request_id] = ask
        self.live[ask.request_id] = request
        self.scored[ask.request_id] = {}
        self.salts[root(ask.salt)] = ask.salt

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        require(
            request is self.live.get(request_id), "{} was not live when it was aborted", request_id
        )
        if request is not None:
            self._remove(request)
        self.check()

    def dispatch(self) -> bool:
        """Plan a step and run it on the device; its result stays in flight."""
        running = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.check_plan(plan, running)
        if plan.is_empty:
            self.device.forget(plan.released)
            require(
                bool(self.in_flight) or not self.scheduler.has_unfinished(),
                "nothing to do for {}",
                list(self.live.values()),
            )
            self.check()
            return False
        result = self.device.run(plan, self.asks)
        self.in_flight.append((plan, result))
        self.num_steps += 1
        self.check()
        return True

    def collect(self) -> None:
        """Apply the result of the oldest step in flight."""
        plan, result = self.in_flight.pop(0)
        for update in self.scheduler.update(plan, result):
            self._apply(update)
        self.check()

    def rewind(self, request_id: str) -> None:
        """Simulate a failure of the device: everything in flight is lost."""
        self.in_flight.clear()
        self.device.lose_all()
        for update in self.scheduler.rewind({request_id: "it broke"}):
            self._remove(update.request, broke=True)
        self.check()

    def finish_all(self, max_in_flight: int = 1) -> None:
        """Run until every request has finished; fail if the scheduler makes no progress."""
        asks = [self.asks[r] for r in self.live]
        limit = self.num_steps + 200 + sum(20 * (len(a.prompt) + a.max_tokens) for a in asks)
        while self.scheduler.has_unfinished() or self.in_flight:
            while len(self.in_flight) < max_in_flight and self.dispatch():
                pass
            if self.in_flight:
                self.collect()
            require(self.num_steps <= limit, "no progress: {}", list(self.live.values()))
        require(not self.live, "never finished: {}", self.live)
        require(self.scheduler.blocks.num_held == 0, "blocks leaked")
        require(
            self.scheduler.stats()["num_waiting"] == 0,
            "an ended request is still counted as waiting",
        )

    def _apply(self, update: RequestUpdate) -> None:
        request = update.request
        require(
            self.live.get(request.request_id) is request, "update of {}, which has ended", request
        )
        scored = self.scored[request.request_id]
        for i, entry in enumerate(update.prompt_logprobs or []):
            scored[update.prompt_logprobs_start + i] = entry.token_id
        if update.finish_reason is not None:
            require(update.finish_reason == request.finish_reason, "two finish reasons")
            self._remove(request)

    def _remove(self, request: Request, *, broke: bool = False) -> None:
        ask = self.asks[request.request_id]
        del self.live[request.request_id]
        self.finished[request.request_id] = request
        answer, reason = ask.answer()
        given = request.output_token_ids
        if request.finish_reason == "abort" or broke:
            require(given == answer[: len(given)], "{}: {}, expected {}", request, given, answer)
            return
        require(given == answer, "{}: answered {}, expected {}", request, given, answer)
        require(request.finish_reason == reason, "{}: {}", request, request.finish_reason)
        require(request.block_table == [], "{} keeps blocks", request)
        if ask.prompt_logprobs and reason != "error":
            expected = dict(enumerate(ask.prompt[1:]))
            require(self.scored[ask.request_id] == expected, "{}: prompt logprobs", request)

    # -- invariants ---------------------------------------------------------------------------

    def _holders(self) -> Counter[int]:
        return Counter(b for r in self.scheduler.running for b in r.block_table)

    def _key(self, request: Request) -> tuple[int, int]:
        is_ordered = self.config.policy == "priority"
        assert request.turn is not None
        return (request.priority if is_ordered else 0, request.turn)

    def check_plan(self, plan: StepPlan, running_before: list[Request]) -> None:
        planned, config = plan.requests, self.config
        require(plan.num_tokens == sum(p.num_tokens for p in planned), "tokens do not add up")
        require(plan.num_tokens <= config.max_batch_tokens, "{} tokens in a step", plan.num_tokens)
        require(all(p.num_tokens > 0 for p in planned), "a request of no tokens")
        is_one = [p.num_tokens == 1 for p in planned]
        require(is_one == sorted(is_one, reverse=True), "decodes do not come first")
        require(len({p.request.request_id for p in planned}) == len(planned), "planned twice")
        rows = sum(p.num_prompt_rows for p in planned)
        require(rows <= config.max_prompt_logprob_rows, "{} rows of prompt logprobs", rows)
        for p in planned:
            require(p.request.status is RequestStatus.RUNNING, "{} is planned", p.request)
            require(p.request.epoch == p.epoch, "{} is planned with another epoch", p.request)
            end = p.start + p.num_tokens
            require(
                p.samples_token == (end >= p.request.num_tokens), "{}: samples_token", p.request
            )
            is_new = p.epoch == 0 and p.request not in running_before
            if is_new and p.request.num_output_tokens == 0:
                require(p.request.num_cached_tokens == p.start, "{}: cached tokens", p.request)
            if not config.enable_chunked_prefill and p.request.params.prompt_logprobs is None:
                require(end >= p.request.num_tokens, "{} is computed in parts", p.request)
        self._check_preempted(plan, running_before)

    def _check_preempted(self, plan: StepPlan, running_before: list[Request]) -> None:
        running = self.scheduler.running
        require(running == sorted(running, key=self._key), "running requests are out of order")
        if plan.preempted:
            require(plan.preempted[-1] is not running_before[0], "the first lost its blocks")
            require(
                min(map(self._key, plan.preempted)) > self._key(running[-1]),
                "a request that is not the last lost its blocks",
            )
            require(set(running) <= set(running_before), "a step that preempted admitted")

    def check(self) -> None:
        """Check that holders match block tables, and that no block is lost or misnamed."""
        blocks, config, held = self.scheduler.blocks, self.config, self._holders()
        for block in range(config.num_blocks):
            require(
                blocks.num_holders(block) == held[block],
                "block {}: {} holders, {} tables",
                block,
                blocks.num_holders(block),
                held[block],
            )
        require(held[0] == 0, "the null block is held")
        require(blocks.num_unheld + len(held) == config.num_blocks - 1, "a block is lost")
        findable = blocks._block_of
        num_cached = sum(held[b] == 0 for b in findable.values())
        require(
            num_cached == blocks.num_cached,
            "{} blocks are cached, num_cached is {}",
            num_cached,
            blocks.num_cached,
        )
        for name, block in findable.items():
            require(self.device.name_of(block, self.salts) == name, "block {} is misnamed", block)
        for request in self.scheduler.running:
            require(request.status is RequestStatus.RUNNING, "{} is not running", request)
            table = request.block_table
            require(len(set(table)) == len(table), "{} holds a block twice", request)
            needed = -(-request.num_computed_tokens // config.block_size)
            require(len(table) == needed, "{} needs {} blocks", request, needed)
        stats = self.scheduler.stats()
        require(len(self.scheduler.running) <= config.max_batch_requests, "too many requests run")
        require(stats["num_running"] + stats["num_waiting"] == len(self.live), "a request is lost")


# -- random runs ------------------------------------------------------------------------------


def random_config(rng: random.Random) -> SchedulerConfig:
    is_chunked = rng.random() < 0.8
    return SchedulerConfig(
        max_batch_tokens=rng.choice([4, 16, 40]) if is_chunked else 64,
        max_batch_requests=4,
        max_model_len=64,
        block_size=rng.choice([1, 4, 4, 5]),
        num_blocks=rng.choice([18, 24, 40]) if rng.random() < 0.9 else 65,
        enable_prefix_caching=rng.random() < 0.8,
        enable_chunked_prefill=is_chunked,
        policy=rng.choice(["fcfs", "priority"]),
        max_prompt_logprob_rows=rng.choice([3, 30]),
    )


def random_asks(rng: random.Random, number: int, config: SchedulerConfig) -> list[Ask]:
    """One request or several forks, with a prompt that shares a prefix with others."""
    longest = min(60, (config.num_blocks - 1) * config.block_size)
    num_shared = rng.randrange(0, longest - 1)
    kind = rng.randrange(3)
    prompt = [(kind * 7 + i * i) % VOCAB_SIZE for i in range(num_shared)]
    prompt = (prompt + [rng.randrange(VOCAB_SIZE) for _ in range(3)])[: longest - 1]
    max_tokens = rng.randrange(1, min(20, longest - len(prompt)) + 1)
    num_answers = rng.choice([1, 1, 1, 3])
    common = {
        "priority": rng.randrange(3),
        "salt": rng.choice(["", "", "other"]),
        "needs_history": rng.random() < 0.2,
        "min_tokens": rng.choice([0, 0, max_tokens]),
        "prompt_logprobs": rng.random() < 0.1,
    }
    asks = []
    for i in range(num_answers):
        parent = None if i == 0 else f"{number}-{rng.randrange(i)}"
        ask = Ask(f"{number}-{i}", prompt, max_tokens, seed=i, fork_of=parent, **common)
        if rng.random() < 0.05:
            ask.breaks_after = rng.randrange(max_tokens)
        elif rng.random() < 0.1 and ask.answer()[1] == "length":
            ask.num_known = rng.randrange(max_tokens)
        asks.append(ask)
    if rng.random() < 0.05:
        asks[0].fork_of = f"{number}-{num_answers - 1}"  # a later request, or itself
    return asks


def random_run(
    seed: int,
    *,
    num_events: int,
    max_in_flight: int,
    num_tenants: int = 1,
    scheduler_class: type[Scheduler] = Scheduler,
) -> Simulation:
    """Random arrivals, aborts, forks, failures and steps, then run until all have finished."""
    rng = random.Random(seed)
    config = random_config(rng)
    simulation = Simulation(config, scheduler_class(config))
    for number in range(num_events):
        event = rng.random()
        if event < 0.2:
            for ask in random_asks(rng, number, config):
                ask.tenant = str(number % num_tenants)
                simulation.add(ask)
        elif event < 0.24 and simulation.live:
            simulation.abort(rng.choice(sorted(simulation.live)))
        elif event < 0.25 and simulation.scheduler.running:
            simulation.rewind(rng.choice(simulation.scheduler.running).request_id)
        elif event < 0.26:
            simulation.scheduler.reset_prefix_cache()
        elif len(simulation.in_flight) < max_in_flight and rng.random() < 0.7:
            simulation.dispatch()
        elif simulation.in_flight:
            simulation.collect()
    simulation.finish_all(max_in_flight)
    return simulation
