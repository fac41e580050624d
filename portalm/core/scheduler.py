"""Which requests compute how many tokens in the next step, and what became of the last one."""

from __future__ import annotations

import bisect
import heapq

from portalm.config import SchedulerConfig
from portalm.core.block_manager import BlockManager
from portalm.core.plan import PlannedRequest, RequestUpdate, StepPlan, StepResult
from portalm.core.prefix_cache import extend_hashes
from portalm.core.request import FinishReason, Request, RequestStatus
from portalm.core.stop import finish_reason
from portalm.errors import InvalidRequest, RequestTooLarge

Key = tuple[int, int]

_WATERMARK = 0.01
"""Share of the pool that admitting a request leaves free, so that it is not preempted at once."""


class Scheduler:
    """Continuous batching over a pool of KV blocks.

    Requests are ordered by (priority, arrival), under the fcfs policy by arrival alone. The queue
    is served in that order and the last in it loses its blocks when they run out. So the first
    request in the order never loses them to another: it always makes progress, ends, and makes
    the next one first. That is why no set of requests can preempt each other for ever. A request
    that could not run alone is refused at the door.

    `schedule` counts tokens as computed when it plans them, so that a step may be planned while
    the one before runs. Steps run in order on the device: a block that a planned step fills may
    be read by any later step, and by the same step, since a layer writes all its keys and values
    before it attends.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """An empty scheduler over a pool of `config.num_blocks`."""
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.running: list[Request] = []
        """In order; these hold blocks."""
        self._waiting: list[tuple[Key, Request]] = []
        """A heap; requests that ended while they waited are dropped when they surface."""
        self._requests: dict[str, Request] = {}
        """All that are not finished."""
        self._released: list[str] = []
        self._num_arrivals = 0
        self._step_id = 0
        self._watermark = max(1, int(config.num_blocks * _WATERMARK))
        self.reset_stats()

    # -- requests -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue `request`; `InvalidRequest` for one that can never be answered."""
        self._check(request)
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        heapq.heappush(self._waiting, (self._key(request), request))

    def _check(self, request: Request) -> None:
        name, config = request.request_id, self.config
        if name in self._requests:
            raise InvalidRequest(f"request id {name!r} is in use", param="request_id")
        if request.num_prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        if request.max_total_tokens > config.max_model_len:
            raise RequestTooLarge(
                f"request {name!r} may grow to {request.max_total_tokens} tokens, "
                f"max_model_len is {config.max_model_len}",
                param="max_tokens",
            )
        if request.num_tokens >= request.max_total_tokens:
            raise RequestTooLarge(
                f"request {name!r} has {request.num_tokens} tokens already and may have "
                f"{request.max_total_tokens}: there is no room for an answer",
                param="prompt",
            )
        # the last token of an answer is drawn, but never computed
        needed = self.blocks.num_blocks_for(request.max_total_tokens - 1)
        if needed > self.blocks.num_usable:
            raise RequestTooLarge(
                f"request {name!r} may need {needed} KV blocks, the pool has "
                f"{self.blocks.num_usable}: lower max_tokens or shorten the prompt",
                param="max_tokens",
            )

    def abort(self, request_id: str) -> Request | None:
        """End a request at any moment; None if no such request is live."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
            self._drop_finished()
        return request

    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._requests)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, changing nothing, while any request runs."""
        if self.running:
            return False
        self.blocks.clear_cache()
        return True

    def _key(self, request: Request) -> Key:
        priority = request.priority if self.config.policy == "priority" else 0
        return (priority, request.arrival)

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: running requests first, then whoever fits from the queue."""
        plan = StepPlan(step_id=self._step_id)
        self._step_id += 1
        self._plan_decodes(plan)
        self._plan_prefills(plan)
        self._publish_planned(plan)
        if not plan.preempted:  # a pool that just overflowed admits nobody
            self._admit_waiting(plan)
        self._decodes_first(plan)
        plan.released, self._released = self._released, []
        return plan

    def _plan_decodes(self, plan: StepPlan) -> None:
        """One token for every running request that has just one: no prompt holds them up."""
        block_size, grow = self.blocks.block_size, self.blocks.grow
        requests = plan.requests
        running, index, num_tokens = self.running, 0, 0
        while index < len(running):
            request = running[index]
            index += 1
            start = request.num_computed_tokens
            known = len(request.token_ids) + request.num_placeholders
            if known - start != 1 or not self._may_run_ahead(request, known):
                continue
            if start >= len(request.block_table) * block_size:
                while not grow(request.block_table, known):
                    victim = running[-1]
                    self._preempt(victim, plan)
                    if victim is request:
                        break
                if request.status is not RequestStatus.RUNNING:
                    continue
            requests.append(PlannedRequest(request, start, 1, True, request.epoch))
            request.num_computed_tokens = known
            request.num_placeholders += 1
            num_tokens += 1
        plan.num_tokens += num_tokens

    @staticmethod
    def _may_run_ahead(request: Request, known: int) -> bool:
        """False where the next token must wait for one that is still on the device."""
        if request.num_placeholders == 0:
            return True
        return known < request.max_total_tokens and not request.needs_history

    def _plan_prefills(self, plan: StepPlan) -> None:
        """Go on with prompts, in order, in what is left of the budget."""
        index = 0
        while index < len(self.running) and plan.num_tokens < self.config.max_batch_tokens:
            request = self.running[index]
            index += 1
            if request.num_pending_tokens <= 1:
                continue
            num_tokens = self._chunk(request, plan)
            if num_tokens == 0:
                continue
            total = request.num_computed_tokens + num_tokens
            while not self.blocks.grow(request.block_table, total):
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is request:
                    break
            if request.status is RequestStatus.RUNNING:
                self._grant(request, num_tokens, plan)

    def _chunk(self, request: Request, plan: StepPlan) -> int:
        """How many of its pending tokens `request` may compute in this step."""
        left = self.config.max_batch_tokens - plan.num_tokens
        if request.params.prompt_logprobs is not None:
            left = min(left, self.config.max_prompt_logprob_rows)
        elif request.num_pending_tokens > left and not self.config.enable_chunked_prefill:
            return 0
        return min(request.num_pending_tokens, left)

    def _grant(self, request: Request, num_tokens: int, plan: StepPlan) -> None:
        draws = num_tokens == request.num_pending_tokens
        start = request.num_computed_tokens
        plan.requests.append(PlannedRequest(request, start, num_tokens, draws, request.epoch))
        plan.num_tokens += num_tokens
        request.num_computed_tokens += num_tokens
        if draws:
            request.num_placeholders += 1

    @staticmethod
    def _decodes_first(plan: StepPlan) -> None:
        requests = plan.requests
        if len(requests) > 1 and any(p.num_tokens > 1 for p in requests):
            plan.requests = [p for p in requests if p.num_tokens == 1]
            plan.requests += [p for p in requests if p.num_tokens > 1]

    # -- preemption ---------------------------------------------------------------------------

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """Take the blocks of the last running request; it waits again in its place."""
        assert victim is self.running[-1]
        self.running.pop()
        for planned in plan.requests:
            if planned.request is victim:
                plan.num_tokens -= planned.num_tokens
                plan.requests.remove(planned)
                break
        plan.preempted.append(victim)
        self._num_preemptions += 1
        victim.num_preemptions += 1
        self._requeue(victim)

    def _requeue(self, request: Request) -> None:
        """Back to the queue, to be computed again; it keeps its tokens, not its blocks."""
        self.blocks.release(request.block_table)
        request.status = RequestStatus.WAITING
        request.epoch += 1
        request.num_computed_tokens = 0
        request.num_placeholders = 0
        request.num_published_blocks = 0
        self._released.append(request.request_id)
        heapq.heappush(self._waiting, (self._key(request), request))

    def rewind(self, failed: dict[str, str]) -> list[RequestUpdate]:
        """After a step that failed: nothing on the device is trusted, all is computed again.

        Args:
            failed: requests that end with an error, with the reason.

        Returns:
            The news of those.
        """
        updates = []
        for request_id, reason in failed.items():
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, "error")
                updates.append(RequestUpdate(request, [], "error", error=reason))
        self._drop_finished()
        while self.running:
            self._requeue(self.running.pop())
        self.blocks.clear_cache()
        return updates

    # -- admission ----------------------------------------------------------------------------

    def _admit_waiting(self, plan: StepPlan) -> None:
        """Admit from the queue in order; the first that does not fit holds up the rest."""
        forks_to_come: list[tuple[Key, Request]] = []
        while (
            self._waiting
            and plan.num_tokens < self.config.max_batch_tokens
            and len(self.running) < self.config.max_batch_requests
        ):
            entry = heapq.heappop(self._waiting)
            request = entry[1]
            if request.status is not RequestStatus.WAITING:
                continue
            parent = self._parent(request)
            if parent is not None and self._num_computed_before(parent, plan) < (
                request.num_prompt_tokens - 1
            ):
                forks_to_come.append(entry)
                continue
            if not self._admit(request, parent, plan):
                heapq.heappush(self._waiting, entry)
                break
        for entry in forks_to_come:
            heapq.heappush(self._waiting, entry)

    @staticmethod
    def _num_computed_before(request: Request, plan: StepPlan) -> int:
        """Tokens in the cache before `plan` runs: what its block copies can read."""
        for planned in plan.requests:
            if planned.request is request:
                return planned.start
        return request.num_computed_tokens

    def _parent(self, request: Request) -> Request | None:
        """The live request whose prompt blocks `request` may share, computed or about to be."""
        if request.fork_of is None or request.num_output_tokens or request.num_preemptions:
            return None
        parent = self._requests.get(request.fork_of)
        if parent is None or parent.num_preemptions:
            return None
        same_prompt = parent.num_prompt_tokens == request.num_prompt_tokens
        return parent if same_prompt and parent.cache_salt == request.cache_salt else None

    def _admit(self, request: Request, parent: Request | None, plan: StepPlan) -> bool:
        """Give `request` its first blocks and tokens; False, changing nothing, if it cannot."""
        if parent is None:
            shared, num_computed, copy_from = self._find_cached(request)
        else:
            shared, num_computed, copy_from = self._blocks_to_fork(request, parent)
        table = list(shared)
        request.num_computed_tokens = num_computed
        num_tokens = self._chunk(request, plan)
        keep_free = self._watermark if self.running else 0
        keep_free += self.blocks.num_unheld_of(shared)
        request.num_computed_tokens = 0
        if num_tokens == 0 or not self._can_grow(len(shared), num_computed + num_tokens, keep_free):
            return False
        self.blocks.hold(shared)
        self.blocks.grow(table, num_computed + num_tokens)
        if copy_from is not None:
            plan.block_copies.append((copy_from, table[len(shared)]))
        request.block_table = table
        request.num_computed_tokens = num_computed
        request.num_published_blocks = len(shared)
        request.status = RequestStatus.RUNNING
        self._count_admission(request, num_computed)
        bisect.insort(self.running, request, key=self._key)
        self._grant(request, num_tokens, plan)
        self._publish(request)
        return True

    def _can_grow(self, num_shared: int, num_tokens: int, keep_free: int) -> bool:
        num_new = self.blocks.num_blocks_for(num_tokens) - num_shared
        return num_new + keep_free <= self.blocks.num_unheld

    def _find_cached(self, request: Request) -> tuple[list[int], int, None]:
        """Blocks of the prefix cache; at least the last token is left to compute."""
        if not self.config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return [], 0, None
        self._extend_hashes(request)
        most = (request.num_tokens - 1) // self.config.block_size
        found = self.blocks.find(request.block_hashes[:most])
        return found, len(found) * self.config.block_size, None

    def _blocks_to_fork(
        self, request: Request, parent: Request
    ) -> tuple[list[int], int, int | None]:
        """The parent's blocks of all prompt tokens but the last, which draws the first token.

        The block that this token is written to is copied before (copy-on-write) if it holds
        others.
        """
        num_computed = request.num_prompt_tokens - 1
        num_full, rest = divmod(num_computed, self.config.block_size)
        copy_from = parent.block_table[num_full] if rest else None
        return parent.block_table[:num_full], num_computed, copy_from

    def _count_admission(self, request: Request, num_computed: int) -> None:
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self._prefix_queries += request.num_prompt_tokens
            self._prefix_hits += request.num_cached_tokens

    # -- prefix cache -------------------------------------------------------------------------

    def _extend_hashes(self, request: Request) -> None:
        extend_hashes(
            request.block_hashes,
            request.token_ids,
            salt=request.cache_salt,
            block_size=self.config.block_size,
        )

    def _publish_planned(self, plan: StepPlan) -> None:
        for planned in plan.requests:
            if planned.num_tokens > 1:  # decodes are published when their token is known
                self._publish(planned.request)

    def _publish(self, request: Request) -> None:
        """Let full blocks be found whose tokens are known and whose computing is planned."""
        num_known = min(request.num_computed_tokens, len(request.token_ids))
        num_full = num_known // self.config.block_size
        if num_full <= request.num_published_blocks or not self.config.enable_prefix_caching:
            return
        self._extend_hashes(request)
        for i in range(request.num_published_blocks, num_full):
            self.blocks.publish(request.block_table[i], request.block_hashes[i])
        request.num_published_blocks = num_full

    # -- results ------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Take over what the step drew; the news, one for each request that has any."""
        updates: list[RequestUpdate] = []
        block_size, num_finished = self.config.block_size, 0
        for planned, token_id in zip(plan.requests, result.token_ids, strict=True):
            request = planned.request
            if request.epoch != planned.epoch or request.status is not RequestStatus.RUNNING:
                continue  # preempted, aborted or ended since it was planned
            if result.failed and request.request_id in result.failed:
                updates.append(self._fail(request, result.failed[request.request_id]))
                num_finished += 1
                continue
            update = None
            if planned.draws_token:
                token_ids = request.token_ids
                token_ids.append(token_id)
                request.num_placeholders -= 1
                update = RequestUpdate(request, [token_id])
                if token_id in request.stop_ids or len(token_ids) >= request.max_total_tokens:
                    update.finish_reason = finish_reason(request)
                if len(token_ids) > (request.num_published_blocks + 1) * block_size:
                    self._publish(request)
                if update.finish_reason is not None:
                    self._finish(request, update.finish_reason)
                    num_finished += 1
            if result.logprobs or result.prompt_logprobs:
                update = self._add_logprobs(update, planned, result)
            if update is not None:
                updates.append(update)
        if num_finished:
            self._drop_finished()
        return updates

    @staticmethod
    def _add_logprobs(
        update: RequestUpdate | None, planned: PlannedRequest, result: StepResult
    ) -> RequestUpdate | None:
        request_id = planned.request.request_id
        prompt_logprobs = result.prompt_logprobs.get(request_id)
        if prompt_logprobs:
            update = update or RequestUpdate(planned.request, [])
            update.prompt_logprobs = prompt_logprobs
            update.prompt_logprobs_start = planned.start
        if update is not None:
            update.logprobs = result.logprobs.get(request_id)
        return update

    def _fail(self, request: Request, reason: str) -> RequestUpdate:
        """Its keys and values are as broken as its logits: nobody may find them."""
        self.blocks.unpublish(b for b in request.block_table if self.blocks.num_holders(b) == 1)
        self._finish(request, "error")
        return RequestUpdate(request, [], "error", error=reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """End a request and free its blocks; `_drop_finished` takes it off the running list."""
        if request.status is RequestStatus.RUNNING:
            self.blocks.release(request.block_table)
            self._released.append(request.request_id)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._requests[request.request_id]

    def _drop_finished(self) -> None:
        self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]

    # -- accounting ---------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Counters back to zero."""
        self._num_preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges, named as in `EngineStats`."""
        return {
            "num_running": len(self.running),
            "num_waiting": len(self._requests) - len(self.running),
            "num_blocks": self.blocks.num_usable,
            "num_used_blocks": self.blocks.num_held,
            "num_cached_blocks": self.blocks.num_cached,
            "kv_waste": self._waste(),
            "prefix_queries_total": self._prefix_queries,
            "prefix_hits_total": self._prefix_hits,
            "preemptions_total": self._num_preemptions,
        }

    def _waste(self) -> float:
        """Share of the slots in held blocks that no token uses, each request's last block aside."""
        num_held = sum(len(r.block_table) for r in self.running)
        if num_held == 0:
            return 0.0
        needed = sum(self.blocks.num_blocks_for(r.num_computed_tokens) for r in self.running)
        return (num_held - needed) / num_held
