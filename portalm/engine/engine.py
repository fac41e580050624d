"""The engine: requests in, tokens out, one step at a time.

It runs in a process of its own under the server, and in the caller's process under `LLM`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from portalm.backend import Backend
from portalm.config import EngineConfig
from portalm.core.plan import Pooled, Refused, RequestUpdate, Sampled, StepPlan, StepResult
from portalm.core.request import Request
from portalm.engine.messages import AddRequest, EngineReady, EngineStats, StepOutputs, TokenOutput
from portalm.engine.setup import EngineSetup, Progress, set_up
from portalm.errors import BackendError, InvalidRequest
from portalm.pooling_params import PoolingParams
from portalm.runner.step_results import DispatchedStep
from portalm.sampling_params import SamplingParams
from portalm.structured.grammar import Grammar, Grammars
from portalm.structured.messages import LoadGrammar

logger = logging.getLogger(__name__)

_GRAMMAR_WAIT_S = 0.01
"""How long a step with nothing to compute waits for a grammar, in seconds."""

_WARM_UP_ID = "portalm-warm-up"


class Engine:
    """A model on a device, answering requests in continuous batches."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        backend: Backend | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load the model and make the KV cache.

        Args:
            config: the model to run and the settings to run it with.
            backend: a started backend; None: start the one that `config.device` names.
            progress: called as the engine loads its model, captures steps and warms up.

        Raises:
            PortaLMError: the model, the device or the settings do not work; the text says why.
        """
        report = progress or (lambda phase, share: None)
        setup = set_up(config, backend, report)
        self.config = config
        self.backend = setup.backend
        self.model_path = setup.model_path
        self.tokenizer_path = setup.tokenizer_path
        self.model_config = setup.model.config
        self.attention_specs = setup.model.attention_specs()
        self.tasks = setup.model.tasks
        self.scheduler = setup.scheduler
        self.runner = setup.runner
        self._max_in_flight = (
            self.backend.capabilities.max_steps_in_flight if config.async_scheduling else 1
        )
        self._in_flight: deque[DispatchedStep] = deque()
        self._num_failures = 0
        """Steps that failed since the last one that did not."""
        self.step_begins: Callable[[int], None] | None = None
        """Called with the number of tokens of every step, before it is dispatched."""
        self._grammars = Grammars()
        self._awaiting_grammar: dict[str, Request] = {}
        """Requests whose grammar is not loaded yet."""
        self._num_prompt_logprobs_sent: dict[str, int] = {}
        self._scheduled_times: dict[str, float] = {}
        """By request id: when it was first in a step, until an output has reported it."""
        self._stats = EngineStats()
        self.ready = self._start(setup, report)

    # -- requests -----------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Add a request. Raise `InvalidRequest` if it can never be answered."""
        self._check(message)
        params, pooling = message.params, message.pooling
        num_prompt = len(message.prompt_token_ids)
        if pooling is not None:
            pooling, max_total = pooling.resolved(self.model_config.pooling), num_prompt
        elif params.max_tokens is None:
            max_total = self.max_model_len
        else:
            max_total = min(num_prompt + params.max_tokens, self.max_model_len)
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            params,
            seed=message.seed,
            max_total_tokens=max_total,
            eos_token_ids=self.model_config.eos_token_ids,
            priority=message.priority,
            cache_salt=message.cache_salt,
            output_token_ids=message.output_token_ids,
            fork_of=message.fork_of,
            bad_words_ids=message.bad_words_ids,
            tenant=message.tenant,
            pooling=pooling,
            second_text_start=message.second_text_start,
            grammar=None if message.grammar is None else self._grammars[message.grammar],
        )
        if message.grammar is None:
            self.scheduler.add(request)
        else:
            self.scheduler.check(request)
            self._awaiting_grammar[request.request_id] = request

    def load_grammar(self, message: LoadGrammar) -> None:
        """Start loading a grammar in the background; requests may name it from now on."""
        self._grammars.load(message)

    def _admit_loaded(self) -> list[TokenOutput]:
        """Queue requests whose grammar is loaded; return the outputs of those that fail."""
        outputs = []
        for request in [r for r in self._awaiting_grammar.values() if _grammar_of(r).is_loaded]:
            del self._awaiting_grammar[request.request_id]
            error: Exception
            try:
                _grammar_of(request).check()
                self.scheduler.add(request)
                continue
            except InvalidRequest as refused:
                error = refused
            except Exception as failed:  # XGrammar may raise anything
                logger.exception("failed to load a grammar")
                error = failed
            outputs.append(
                TokenOutput(
                    request_id=request.request_id,
                    token_ids=[],
                    finish_reason="error",
                    error=str(error),
                    is_refused=isinstance(error, InvalidRequest),
                )
            )
        return outputs

    @property
    def max_model_len(self) -> int:
        """Maximum length of prompt plus answer, in tokens."""
        return self.scheduler.config.max_model_len

    def _check(self, message: AddRequest) -> None:
        """Raise `InvalidRequest` for what could crash the device; the client checks the rest."""
        vocab_size = self.model_config.vocab_size
        for token_id in (*message.prompt_token_ids, *message.output_token_ids):
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})",
                    param="prompt",
                )
        params = message.params
        task = "generate" if message.pooling is None else message.pooling.task
        if task not in self.tasks:
            raise InvalidRequest(
                f"this model does not support {task}; supported tasks: {', '.join(self.tasks)}"
            )
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if any(token_id >= vocab_size for token_id in ids):
                raise InvalidRequest(
                    f"{name} contains token id {max(ids)}, outside the vocabulary "
                    f"(0 to {vocab_size - 1})",
                    param=name,
                )

    def abort(self, request_ids: Sequence[str]) -> list[TokenOutput]:
        """End these requests now; return an output for each one that was live."""
        outputs = []
        for request_id in request_ids:
            awaiting = self._awaiting_grammar.pop(request_id, None)
            if awaiting is not None or self.scheduler.abort(request_id) is not None:
                self._num_prompt_logprobs_sent.pop(request_id, None)
                outputs.append(
                    TokenOutput(request_id=request_id, token_ids=[], finish_reason="abort")
                )
        return outputs

    def has_work(self) -> bool:
        """Return True while a request is unfinished or a step is on the device."""
        return bool(self._in_flight or self._awaiting_grammar) or self.scheduler.has_unfinished()

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; False, changing nothing, while any request runs."""
        return self.scheduler.reset_prefix_cache()

    # -- steps --------------------------------------------------------------------------------

    def step(self) -> StepOutputs:
        """Dispatch steps, wait for the oldest one and return its outputs.

        Any failure of the device other than its loss ends one request, the one with the most tokens
        in the step. Where memory ran out, smaller steps are tried first.

        Raises:
            BackendError: of kind device_lost: the engine cannot continue.
        """
        started = time.perf_counter()
        plan: StepPlan | None = None
        failed = self._admit_loaded() if self._awaiting_grammar else []
        # a capture needs an idle device: until all are made, steps do not overlap
        max_in_flight = 1 if self.capture_next() else self._max_in_flight
        try:
            while len(self._in_flight) < max_in_flight:
                plan = self.scheduler.schedule()
                if plan.is_empty:
                    self.runner.forget(plan.released)
                    break
                if plan.admitted:
                    now = time.monotonic()
                    self._scheduled_times.update((r.request_id, now) for r in plan.admitted)
                if self.step_begins is not None:
                    self.step_begins(plan.num_tokens)
                self._in_flight.append(self.runner.dispatch(plan))
            if not self._in_flight:
                if self._awaiting_grammar:
                    _grammar_of(next(iter(self._awaiting_grammar.values()))).wait(_GRAMMAR_WAIT_S)
                return self._outputs([], failed)
            step = self._in_flight.popleft()
            plan = step.plan
            result = step.result()
        except BackendError as error:
            if error.kind == "device_lost" or plan is None:
                raise
            return self._outputs(self._recover(plan, error), failed)
        self._num_failures = 0
        updates = self.scheduler.update(plan, result)
        self._count(plan, result, time.perf_counter() - started)
        return self._outputs(updates, failed)

    @property
    def has_captures_left(self) -> bool:
        """True while buckets remain to be captured; requests are served in the meantime."""
        return self.runner.graphs.next_to_capture() is not None

    def capture_next(self) -> bool:
        """Capture a bucket if one is left and the device is idle; return True if one was tried."""
        if self._in_flight or not self.has_captures_left:
            return False
        try:
            self.runner.capture_next()
        except BackendError as error:
            if error.kind == "device_lost" or self.backend.capabilities.static_shapes:
                raise
            logger.warning("a capture failed, the remaining steps run uncaptured: %s", error)
            self.runner.graphs.give_up()
        if not self.has_captures_left:
            self.runner.graphs.seal()
        return True

    def _recover(self, plan: StepPlan, error: BackendError) -> list[RequestUpdate]:
        """Recover from a failed step: end its largest request and recompute all others.

        Sampling is stateless, so the others sample the same tokens as without the failure. Where
        memory ran out, a retry with less of it comes before any request ends.
        """
        self._num_failures += 1
        failed = {}
        if not (error.kind == "oom" and self._can_retry(plan)):
            largest = max(plan.requests, key=lambda p: (p.num_tokens, p.start)).request
            reason = f"the device failed on this request ({error.kind}): {error}"
            failed[largest.request_id] = reason
        logger.error(
            "step %d failed (%s: %s); %s, %d requests are recomputed",
            plan.step_id,
            error.kind,
            error,
            f"request {next(iter(failed))} ends" if failed else "no request ends",
            len(plan.requests) - len(failed),
        )
        for step in self._in_flight:  # planned on top of the failed one: drop their ids
            try:
                step.result()
            except BackendError as later:
                if later.kind == "device_lost":
                    raise
        self._in_flight.clear()
        return self.scheduler.rewind(failed)

    def _can_retry(self, plan: StepPlan) -> bool:
        """Halve the token limit and retry; a step that cannot shrink is retried once."""
        config = self.scheduler.config
        limit = max(plan.num_tokens // 2, config.max_batch_requests)
        if plan.num_tokens <= limit or not config.enable_chunked_prefill:
            return self._num_failures == 1
        logger.warning(
            "limiting steps to %d tokens: one of %d did not fit into the device's memory (lower "
            "--max-num-batched-tokens or --gpu-memory-utilization to leave more room)",
            limit,
            plan.num_tokens,
        )
        self.scheduler.limit_tokens(limit)
        return True

    def _outputs(self, updates: list[RequestUpdate], more: Sequence[TokenOutput]) -> StepOutputs:
        """Outputs of `updates` and `more`, and of requests that have been in their first step."""
        outputs = [*more, *(self._output(u) for u in updates)]
        outputs += [
            TokenOutput(request_id=request_id, token_ids=[], scheduled_time=scheduled_time)
            for request_id, scheduled_time in self._scheduled_times.items()
        ]
        self._scheduled_times.clear()
        return StepOutputs(outputs, self.stats())

    def _output(self, update: RequestUpdate) -> TokenOutput:
        request, outcome = update.request, update.outcome
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=[],
            finish_reason=update.finish_reason,
            stop_reason=request.stop_reason if update.finish_reason else None,
            num_cached_tokens=request.num_cached_tokens,
        )
        if isinstance(outcome, Sampled):
            output.token_ids, output.logprobs = outcome.token_ids, outcome.logprobs
        elif isinstance(outcome, Pooled):
            output.pooled = outcome.values
        elif outcome is not None:
            output.error, output.is_refused = outcome.reason, isinstance(outcome, Refused)
        if self._scheduled_times:
            output.scheduled_time = self._scheduled_times.pop(request.request_id, None)
        if update.prompt_logprobs:
            # a prompt that is recomputed after preemption reports them again: send each once
            sent = self._num_prompt_logprobs_sent.get(request.request_id, 0)
            first = update.prompt_logprobs_start
            output.prompt_logprobs = update.prompt_logprobs[max(0, sent - first) :]
            self._num_prompt_logprobs_sent[request.request_id] = max(
                sent, first + len(update.prompt_logprobs)
            )
        if update.finish_reason is not None:
            self._num_prompt_logprobs_sent.pop(request.request_id, None)
        return output

    # -- accounting ---------------------------------------------------------------------------

    def _count(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        stats = self._stats
        stats.steps_total += 1
        stats.last_step_tokens = plan.num_tokens
        stats.last_step_s = seconds
        stats.generation_tokens_total += sum(
            len(outcome.token_ids) for outcome in result.outcomes if isinstance(outcome, Sampled)
        )
        for planned in plan.requests:
            prompt_left = planned.request.num_prompt_tokens - planned.start
            if prompt_left > 0:
                stats.prompt_tokens_total += min(prompt_left, planned.num_tokens)

    def stats(self) -> EngineStats:
        """Return the current counters and gauges."""
        for name, value in self.scheduler.stats().items():
            setattr(self._stats, name, value)
        self._stats.num_waiting += len(self._awaiting_grammar)
        return self._stats

    # -- start and end ------------------------------------------------------------------------

    def _start(self, setup: EngineSetup, report: Progress) -> EngineReady:
        """Capture steps where that must precede service, warm up, and describe the engine."""
        started = time.perf_counter()
        if self.backend.capabilities.static_shapes:
            self.runner.capture_all(lambda share: report("capture", share))
            self.runner.graphs.seal()
            report("capture", 1.0)
        report("warm_up", 0.0)
        self._warm_up()
        report("warm_up", 1.0)
        return EngineReady(
            model=self.config.model,
            device=self.backend.name,
            device_summary=self.backend.find().summary,
            dtype=setup.model.dtype,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=list(self.model_config.eos_token_ids),
            max_model_len=self.max_model_len,
            num_blocks=self.scheduler.config.num_blocks - 1,
            block_size=self.config.block_size,
            tasks=self.tasks,
            vector_size=self.model_config.hidden_size,
            sampling_defaults=setup.sampling_defaults,
            startup_s={**setup.startup_s, "warm_up": time.perf_counter() - started},
        )

    def _warm_up(self) -> None:
        """Run a request of two tokens, so that a device that cannot compute fails at startup."""
        task = self.tasks[0]
        self.add(
            AddRequest(
                request_id=_WARM_UP_ID,
                prompt_token_ids=[0, 0],
                params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
                seed=0,
                pooling=None if task == "generate" else PoolingParams(task=task),
            )
        )
        outputs: list[TokenOutput] = []
        while self.has_work():
            outputs += self.step().outputs
        if outputs[-1].finish_reason == "error":
            raise BackendError("kernel", f"the warm-up request failed: {outputs[-1].error}")
        self.reset_prefix_cache()
        self._stats = EngineStats()
        self.scheduler.reset_stats()

    def close(self) -> None:
        """Wait for the device; the engine must not be used afterwards."""
        while self._in_flight:
            self._in_flight.popleft().result()
        self.runner.graphs.unseal()  # another engine may use the backend next
        self._grammars.close()


def _grammar_of(request: Request) -> Grammar:
    assert isinstance(request.grammar, Grammar)
    return request.grammar
