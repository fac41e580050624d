"""Plans each step (which requests compute how many tokens) and applies its outcomes."""

from __future__ import annotations

import bisect
from dataclasses import replace

from portalm.config import SchedulerConfig
from portalm.core.block_manager import BlockManager, NoBlocks
from portalm.core.forks import blocks_to_fork, fork_parent, fork_root, is_prompt_computed
from portalm.core.plan import (
    Failed,
    PlannedRequest,
    Pooled,
    Refused,
    RequestUpdate,
    Sampled,
    StepPlan,
    StepResult,
)
from portalm.core.prefix_cache import extend_hashes
from portalm.core.request import FinishReason, Request, RequestStatus
from portalm.core.stop import finish_reason
from portalm.core.waiting_queue import Key, WaitingQueue
from portalm.errors import InvalidRequest, RequestTooLarge

_WATERMARK = 0.01
"""Share of the pool that stays free when a request is admitted, to avoid preempting it at once."""


class Scheduler:
    """Continuous batching over a pool of KV blocks.

    Order. Each tenant's queue is ordered by (priority, arrival), or by arrival alone under the fcfs
    policy. Among tenants whose first requests have equal priority, the one with the fewest running
    requests is served. Running requests are ordered by (priority, turn), where turn is the order in
    which they first ran; with arrival instead, a tenant's long queue could repeatedly take the
    blocks of requests that arrived after it. When blocks run out, the last running request in
    that order is preempted. So a request never loses blocks to a later one, and the first one never
    loses any: it computes at least one token per step (the token budget has room for one of each
    running request), finishes, and the next one becomes first. Therefore requests cannot preempt
    each other forever. A request that could not run alone is refused when it is added.

    Running ahead. `schedule` counts tokens as computed when it plans them, so that a step can be
    planned while the previous one runs. Steps run in order on the device, which makes two things
    safe. Blocks of a finished request are reused at once, because any step that still writes to
    them runs before the next one. And a full block of known tokens can be found as soon as the step
    that fills it is planned: steps that read it run later, or it is the same step, in which a layer
    writes all keys and values before it attends.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Start without requests, over a pool of `config.num_blocks` blocks."""
        self.config = config
        self.blocks = (
            BlockManager(config.num_blocks, config.block_size) if config.keeps_kv else NoBlocks()
        )
        self.running: list[Request] = []
        """Running requests, in order; only these hold blocks."""
        self._waiting = WaitingQueue()
        self._requests: dict[str, Request] = {}
        """Unfinished requests by id."""
        self._released: list[str] = []
        self._num_arrivals = 0
        self._num_turns = 0
        self._step_id = 0
        self._watermark = max(1, int(config.num_blocks * _WATERMARK)) if config.keeps_kv else 0
        self.reset_stats()

    # -- requests -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue `request`. Raise `InvalidRequest` if it can never be answered."""
        self.check(request)
        request.fork_of = fork_root(request, self._requests)
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.push(self._key(request), request)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if `request` can never be answered."""
        name, config = request.request_id, self.config
        if name in self._requests:
            raise InvalidRequest(
                f"request id {name!r} is in use: choose another one", param="request_id"
            )
        if request.num_prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        if request.max_total_tokens > config.max_model_len:
            raise RequestTooLarge(
                f"request {name!r} may grow to {request.max_total_tokens} tokens, "
                f"max_model_len is {config.max_model_len}: lower max_tokens or shorten the prompt",
                param="max_tokens",
            )
        if request.num_tokens >= request.max_total_tokens and request.pooling is None:
            raise RequestTooLarge(
                f"request {name!r} has {request.num_tokens} tokens and its limit is "
                f"{request.max_total_tokens}: shorten the prompt to leave room for an answer",
                param="prompt",
            )
        # the last token of an answer is sampled but never computed
        max_computed = request.max_total_tokens - (1 if request.pooling is None else 0)
        needed = self.blocks.num_blocks_for(max_computed)
        if needed > self.blocks.num_usable:
            raise RequestTooLarge(
                f"request {name!r} may need {needed} KV blocks, the pool has "
                f"{self.blocks.num_usable}: lower max_tokens or shorten the prompt",
                param="max_tokens",
            )

    def abort(self, request_id: str) -> Request | None:
        """End a live request at any time and return it; None if there is none with this id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a live request at any time; outcomes of steps in flight are dropped."""
        was_running = request.status is RequestStatus.RUNNING
        self._end(request, reason)
        if was_running:
            self.running.remove(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End a request and free its blocks; the caller removes it from `running`."""
        if request.status is RequestStatus.RUNNING:
            self.blocks.release(request.block_table)
            self._waiting.note_running(request, -1)
            self._released.append(request.request_id)
            request.status = RequestStatus.FINISHED
        else:
            request.status = RequestStatus.FINISHED
            self._waiting.note_end()
        request.finish_reason = reason
        del self._requests[request.request_id]

    def has_unfinished(self) -> bool:
        """Return True while any request waits or runs."""
        return bool(self._requests)

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; False, changing nothing, while any request runs."""
        if self.running:
            return False
        self.blocks.clear_cache()
        return True

    def _key(self, request: Request) -> Key:
        priority = request.priority if self.config.policy == "priority" else 0
        return (priority, request.arrival)

    def _running_key(self, request: Request) -> Key:
        assert request.turn is not None
        priority = request.priority if self.config.policy == "priority" else 0
        return (priority, request.turn)

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: running requests first, then those from the queue that fit.

        Prefill, chunked prefill and decode are one case: a request has pending tokens, and the
        plan says how many of them to compute now.
        """
        plan = StepPlan(step_id=self._step_id)
        self._step_id += 1
        unfinished_prompts = self._plan_decodes(plan)
        self._plan_chunks(unfinished_prompts, plan)
        if not plan.preempted:  # the pool has just overflowed: admit nothing
            self._admit_waiting(unfinished_prompts, plan)
        self._decodes_first(plan)
        plan.released, self._released = self._released, []
        return plan

    def _plan_decodes(self, plan: StepPlan) -> list[Request]:
        """Plan a token for each running request with one pending token; return the others in order.

        Decodes are planned first so that prompts do not delay them. The body of this hot loop (256
        iterations per step) inlines `_grant`.
        """
        block_size, requests = self.blocks.block_size, plan.requests
        new_tuple = tuple.__new__  # takes a third of the time of PlannedRequest(...)
        unfinished_prompts: list[Request] = []
        for request in self.running:  # preemption only removes from its end
            start = request.num_computed_tokens
            num_placeholders = request.num_placeholders
            known = len(request.token_ids) + num_placeholders
            if known - start != 1 or request.pooling is not None:
                unfinished_prompts.append(request)
                continue
            if num_placeholders and (request.needs_history or known >= request.max_total_tokens):
                continue  # the next token depends on one that is still on the device
            if start >= len(request.block_table) * block_size and not self._grow(
                request, known, plan
            ):
                continue
            requests.append(new_tuple(PlannedRequest, (request, start, 1, True, request.epoch)))
            request.num_computed_tokens = known
            request.num_placeholders = num_placeholders + 1
        plan.num_tokens = len(requests)
        return unfinished_prompts

    def _plan_chunks(self, unfinished_prompts: list[Request], plan: StepPlan) -> None:
        """Continue prompts, in order, within the rest of the token budget."""
        for request in unfinished_prompts:
            if request.status is not RequestStatus.RUNNING:
                break  # preempted by a request before it, as are those after it
            num_tokens = self._chunk(request, request.num_pending_tokens, plan)
            total = request.num_computed_tokens + num_tokens
            if num_tokens and self._grow(request, total, plan):
                self._grant(request, num_tokens, plan)
        for request in unfinished_prompts:  # only once it is certain that they stay in the plan
            if request.status is RequestStatus.RUNNING:
                self._publish(request)

    def _chunk(self, request: Request, num_pending: int, plan: StepPlan) -> int:
        """Number of its `num_pending` tokens that `request` may compute in this step."""
        left = self.config.max_batch_tokens - plan.num_tokens
        if request.params.prompt_logprobs is not None:
            num_rows = sum(planned.num_prompt_rows for planned in plan.requests)
            left = min(left, self.config.max_prompt_logprob_rows - num_rows)
        elif num_pending > left and not self.config.enable_chunked_prefill:
            return 0
        return min(num_pending, left)

    def _grant(self, request: Request, num_tokens: int, plan: StepPlan) -> None:
        """Add `request` to the plan with its next `num_tokens` tokens."""
        samples = num_tokens == request.num_pending_tokens and request.pooling is None
        start = request.num_computed_tokens
        plan.requests.append(PlannedRequest(request, start, num_tokens, samples, request.epoch))
        plan.num_tokens += num_tokens
        request.num_computed_tokens += num_tokens
        if samples:
            request.num_placeholders += 1
        elif request.pooling is not None:
            plan.has_pooled = True

    @staticmethod
    def _decodes_first(plan: StepPlan) -> None:
        """Move requests with one token to the front, as backends expect."""
        requests = plan.requests
        if plan.num_tokens > len(requests):
            plan.requests = [p for p in requests if p.num_tokens == 1]
            plan.requests += [p for p in requests if p.num_tokens > 1]

    # -- preemption ---------------------------------------------------------------------------

    def _grow(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Give `request` blocks for `num_tokens` in total, preempting the last requests if needed.

        Return False if `request` itself was the last, and is preempted.
        """
        while not self.blocks.grow(request.block_table, num_tokens):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """Take the blocks of the last running request and put it back into the queue."""
        assert victim is self.running[-1]
        self.running.pop()
        for i, planned in enumerate(plan.requests):
            if planned.request is victim:
                plan.num_tokens -= planned.num_tokens
                del plan.requests[i]
                break
        plan.preempted.append(victim)
        self._num_preemptions += 1
        victim.num_preemptions += 1
        self._requeue(victim)

    def _requeue(self, request: Request) -> None:
        """Put a running request back into the queue; it keeps its tokens but not its blocks.

        Sampled tokens that are still on the device are dropped: sampled again, they are the same.
        """
        self.blocks.release(request.block_table)
        self._waiting.note_running(request, -1)
        request.status = RequestStatus.WAITING
        request.epoch += 1
        request.num_computed_tokens = 0
        request.num_placeholders = 0
        request.num_published_blocks = 0
        self._released.append(request.request_id)
        self._waiting.push(self._key(request), request)

    def limit_tokens(self, max_batch_tokens: int) -> None:
        """Plan at most `max_batch_tokens` tokens per step from now on."""
        self.config = replace(self.config, max_batch_tokens=max_batch_tokens)

    def rewind(self, failed: dict[str, str]) -> list[RequestUpdate]:
        """Recover from a failed step: requeue every running request and empty the prefix cache.

        Nothing on the device is trusted, so requests are computed from their first token.

        Args:
            failed: ids of requests to end with an error, and the reason for each.

        Returns:
            An update for each of those.
        """
        updates = []
        for request_id, reason in failed.items():
            request = self._requests.get(request_id)
            if request is not None:
                self.finish(request, "error")
                updates.append(RequestUpdate(request, Failed(reason), "error"))
        while self.running:
            self._requeue(self.running.pop())
        self.blocks.clear_cache()
        return updates

    # -- admission ----------------------------------------------------------------------------

    def _admit_waiting(self, unfinished_prompts: list[Request], plan: StepPlan) -> None:
        """Admit from the queue in order, up to the first request that does not fit."""
        num_promised = sum(self._num_missing_blocks(r) for r in unfinished_prompts)
        admitted: set[Request] = set()
        forks_to_come: list[Request] = []
        while (
            plan.num_tokens < self.config.max_batch_tokens
            and len(self.running) < self.config.max_batch_requests
        ):
            request = self._waiting.first()
            if request is None:
                break
            parent = fork_parent(request, self._requests)
            if parent is not None and (parent in admitted or not is_prompt_computed(parent, plan)):
                forks_to_come.append(request)
                self._waiting.pop(request)
                continue
            if not self._admit(request, parent, num_promised, plan):
                break
            admitted.add(request)
            num_promised += self._num_missing_blocks(request)
        for request in forks_to_come:
            self._waiting.push(self._key(request), request)

    def _num_missing_blocks(self, request: Request) -> int:
        """Number of blocks that the rest of a prompt will need."""
        return self.blocks.num_blocks_for(request.num_tokens) - len(request.block_table)

    def _admit(
        self, request: Request, parent: Request | None, num_promised: int, plan: StepPlan
    ) -> bool:
        """Start the first request of the queue; False, changing nothing, if it does not fit.

        All of its known tokens must fit, in addition to the `num_promised` blocks that other
        prompts will take, although it takes only the blocks of its first chunk: a prompt that is
        preempted halfway was computed for nothing.
        """
        if parent is None:
            shared, num_computed, copy_from = self._find_cached(request)
        else:
            shared, num_computed, copy_from = blocks_to_fork(parent, self.config.block_size)
        num_tokens = self._chunk(request, request.num_tokens - num_computed, plan)
        num_taken = self.blocks.num_blocks_for(request.num_tokens) - len(shared)
        num_taken += self.blocks.num_unheld_of(shared)
        keep_free = num_promised + self._watermark if self.running else 0
        if num_tokens == 0 or num_taken + keep_free > self.blocks.num_unheld:
            return False
        self._waiting.pop(request)
        self._waiting.note_running(request, 1)
        self.blocks.hold(shared)
        request.block_table = list(shared)
        self.blocks.grow(request.block_table, num_computed + num_tokens)
        if copy_from is not None:
            plan.block_copies.append((copy_from, request.block_table[len(shared)]))
        request.num_computed_tokens = num_computed
        request.num_published_blocks = len(shared)
        if request.epoch == 0:  # admitted for the first time
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            self._count_lookup(request, parent)
            plan.admitted.append(request)
        request.status = RequestStatus.RUNNING
        if request.turn is None:
            request.turn = self._num_turns
            self._num_turns += 1
        bisect.insort(self.running, request, key=self._running_key)
        self._grant(request, num_tokens, plan)
        self._publish(request)
        return True

    # -- prefix cache -------------------------------------------------------------------------

    def _reads_cache(self, request: Request) -> bool:
        """True if `request` may use cached blocks; their hidden states and logits are not kept."""
        if request.pooling is not None and request.pooling.needs_all_states:
            return False
        return self.config.enable_prefix_caching and request.params.prompt_logprobs is None

    def _find_cached(self, request: Request) -> tuple[list[int], int, None]:
        """Cached blocks and the number of tokens in them; at least one token is left to compute."""
        if not self._reads_cache(request):
            return [], 0, None
        self._extend_hashes(request)
        max_blocks = (request.num_tokens - 1) // self.config.block_size
        found = self.blocks.find(request.block_hashes[:max_blocks])
        return found, len(found) * self.config.block_size, None

    def _count_lookup(self, request: Request, parent: Request | None) -> None:
        if parent is None and self._reads_cache(request):
            self._prefix_queries += request.num_prompt_tokens
            self._prefix_hits += request.num_cached_tokens

    def _extend_hashes(self, request: Request) -> None:
        extend_hashes(
            request.block_hashes,
            request.token_ids,
            salt=request.cache_salt,
            block_size=self.config.block_size,
        )

    def _publish(self, request: Request) -> None:
        """Add full blocks to the prefix cache once their tokens are known and planned."""
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
        """Apply a step's outcomes and return an update for each request that changed.

        Outcomes of requests that were preempted, aborted or finished since they were planned are
        dropped.
        """
        updates: list[RequestUpdate] = []
        has_ended = False
        for planned, outcome in zip(plan.requests, result.outcomes, strict=True):
            request, _, _, _, epoch = planned
            if request.epoch != epoch or request.status is not RequestStatus.RUNNING:
                continue
            if isinstance(outcome, Sampled):
                update = self._append(request, outcome)
            elif outcome is not None:
                update = self._end_with(request, outcome)
            else:
                continue
            if update.finish_reason is not None:
                has_ended = True
            updates.append(update)
        if result.prompt_logprobs:
            self._add_prompt_logprobs(plan, result, updates)
        if has_ended:
            self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]
        return updates

    def _append(self, request: Request, sampled: Sampled) -> RequestUpdate:
        """Append sampled tokens, up to one that ends the request; those after it are dropped."""
        token_ids, stop_ids = request.token_ids, request.stop_ids
        num_before = num_tokens = len(token_ids)
        reason = None
        request.num_placeholders -= 1
        for token_id in sampled.token_ids:
            token_ids.append(token_id)
            num_tokens += 1
            if token_id in stop_ids or num_tokens >= request.max_total_tokens:
                reason = finish_reason(request)
                if reason is not None:
                    break
        if num_tokens > (request.num_published_blocks + 1) * self.config.block_size:
            self._publish(request)
        if reason is None:
            return RequestUpdate(request, sampled)
        self._end(request, reason)
        num_new, logprobs = num_tokens - num_before, sampled.logprobs
        kept = Sampled(sampled.token_ids[:num_new], logprobs and logprobs[:num_new])
        return RequestUpdate(request, kept, reason)

    def _end_with(self, request: Request, outcome: Pooled | Failed | Refused) -> RequestUpdate:
        """End a request whose outcome is its last: pooled output or an error."""
        if isinstance(outcome, Failed):
            # keys and values may be as broken as the logits: no other request may find them, and
            # requests that share them already fail on their own logits
            self.blocks.unpublish(request.block_table)
        reason: FinishReason = "stop" if isinstance(outcome, Pooled) else "error"
        self._end(request, reason)
        return RequestUpdate(request, outcome, reason)

    @staticmethod
    def _add_prompt_logprobs(
        plan: StepPlan, result: StepResult, updates: list[RequestUpdate]
    ) -> None:
        """Add prompt logprobs to `updates`, with a new update where the step had no outcome."""
        update_of = {update.request.request_id: update for update in updates}
        for index, entries in result.prompt_logprobs.items():
            planned = plan.requests[index]
            request = planned.request
            update = update_of.get(request.request_id)
            if update is None:
                if request.epoch != planned.epoch or request.status is not RequestStatus.RUNNING:
                    continue
                update = RequestUpdate(request, None)
                updates.append(update)
            if update.finish_reason != "error":
                update.prompt_logprobs = entries
                update.prompt_logprobs_start = planned.start

    # -- accounting ---------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        self._num_preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def stats(self) -> dict[str, int | float]:
        """Return counters and gauges, named as in `EngineStats`."""
        return {
            "num_running": len(self.running),
            "num_waiting": len(self._waiting),
            "num_blocks": self.blocks.num_usable,
            "num_used_blocks": self.blocks.num_held,
            "num_cached_blocks": self.blocks.num_cached,
            "kv_waste": self._waste(),
            "prefix_queries_total": self._prefix_queries,
            "prefix_hits_total": self._prefix_hits,
            "preemptions_total": self._num_preemptions,
        }

    def _waste(self) -> float:
        """Share of held blocks in which no slot is used, 0 to 1."""
        block_size = self.config.block_size
        num_held = num_needed = 0
        for request in self.running:
            num_held += len(request.block_table)
            num_needed += -(-request.num_computed_tokens // block_size)
        return (num_held - num_needed) / num_held if num_held else 0.0
