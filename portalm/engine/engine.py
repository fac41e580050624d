"""The engine: requests in, tokens out, one step at a time.

The only writer of a request besides the scheduler. It runs in its own process under the server,
in the caller's under `LLM`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from portalm.backend import Backend, KVSpec, Weights, load_backend
from portalm.config import MAX_PROMPT_LOGPROB_ROWS, EngineConfig, ModelConfig
from portalm.core.plan import RequestUpdate, StepPlan, StepResult
from portalm.core.request import Request
from portalm.core.scheduler import Scheduler
from portalm.engine.messages import AddRequest, EngineReady, EngineStats, StepOutputs, TokenOutput
from portalm.errors import BackendError, ConfigError, InvalidRequest, Unsupported
from portalm.models.hub import resolve_model
from portalm.models.loader import open_checkpoint
from portalm.models.model import AS_CAST, Quantization
from portalm.models.registry import model_class
from portalm.pooling_params import PoolingParams
from portalm.runner.memory import activation_bytes, kv_budget, measured_bytes
from portalm.runner.model_runner import ModelRunner, StepInFlight
from portalm.sampling_params import SamplingParams
from portalm.structured.grammar import Grammar, Grammars
from portalm.structured.messages import LoadGrammar

if TYPE_CHECKING:
    from portalm.models.model import Model

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with a phase (load, capture, warm_up) and its share done, 0 to 1."""

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_ROUNDED = {
    "int8": Quantization(keep=True, layers="int8", head="int8"),
    # the head decides between tokens: 4 bits there cost more than they save
    "int4": Quantization(keep=True, layers="int4_min", head="int8"),
    "fp8": Quantization(layers="fp8"),
}

_GRAMMAR_WAIT_S = 0.01
"""How long a step with nothing to compute waits for a grammar."""

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
            config: what to run, where.
            backend: a started backend; None: `config.device`'s.
            progress: told how far loading is.

        Raises:
            PortaLMError: the model, the device or the settings do not work; the text says why.
        """
        started = time.perf_counter()
        tell = progress or (lambda phase, share: None)
        self.config = config
        self.backend = backend if backend is not None else load_backend(config.device)
        if config.cpu_threads is not None:
            self.backend.use_threads(config.cpu_threads)

        self.model_path = resolve_model(config.model, revision=config.revision)
        self.tokenizer_path = (
            self.model_path if config.tokenizer is None else resolve_model(config.tokenizer)
        )
        checkpoint = open_checkpoint(self.model_path, config, self.backend.device())
        try:
            max_model_len = _choose_max_model_len(config, checkpoint.config)
            self.model_config = checkpoint.config.serving(max_model_len)
            dtype = _choose_dtype(config, self.model_config, self.backend)
            model = model_class(self.model_config.architecture)(self.model_config, dtype)
            _check_claims(config, model, self.backend, dtype)
            weights = model.load(
                checkpoint,
                self.backend,
                quantization=_choose_quantization(config, self.backend, dtype),
                progress=lambda share: tell("load", share),
            )
        finally:
            checkpoint.close()
        loaded = time.perf_counter()

        self.attention_specs = model.attention_specs()
        self.tasks = model.tasks
        spec = model.kv_spec(config.block_size, _kv_dtype(config, dtype))
        num_blocks = self._num_blocks(model, weights, spec, dtype, max_model_len)
        self.scheduler = Scheduler(
            config.scheduler_config(max_model_len=max_model_len, num_blocks=num_blocks)
        )
        kv = None if spec is None else self.backend.kv_alloc(spec, self.scheduler.config.num_blocks)
        self.runner = ModelRunner(
            model,
            weights,
            kv,
            self.backend,
            self.scheduler.config,
            enforce_eager=config.enforce_eager,
        )
        self._max_in_flight = (
            self.backend.capabilities.max_steps_in_flight if config.async_scheduling else 1
        )
        self._in_flight: deque[StepInFlight] = deque()
        self._num_failures = 0
        """Of steps behind each other, up to now."""
        self.step_begins: Callable[[int], None] | None = None
        """Called with the number of tokens of every step, before the device gets it."""
        self._grammars = Grammars()
        self._awaiting: dict[str, Request] = {}
        """Requests whose grammar is not loaded yet."""
        self._num_prompt_logprobs_sent: dict[str, int] = {}
        self._scheduled_times: dict[str, float] = {}
        """Of requests that are in a step for the first time, until outputs are given out."""
        self._stats = EngineStats()
        budgeted = time.perf_counter()

        if self.backend.capabilities.static_shapes:
            self._capture_all(tell)
        tell("warm_up", 0.0)
        self._warm_up()
        tell("warm_up", 1.0)
        self.ready = EngineReady(
            model=config.model,
            device=self.backend.name,
            device_summary=self.backend.find().summary,
            dtype=dtype,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=list(self.model_config.eos_token_ids),
            max_model_len=max_model_len,
            num_blocks=self.scheduler.config.num_blocks - 1,
            block_size=config.block_size,
            tasks=model.tasks,
            vector_size=self.model_config.hidden_size,
            startup_s={
                "load": loaded - started,
                "budget": budgeted - loaded,
                "warm_up": time.perf_counter() - budgeted,
            },
        )

    # -- requests -----------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Take a request. Raises `InvalidRequest` for one that can never be answered."""
        self._check(message)
        params, pooling = message.params, message.pooling
        most = num_prompt = len(message.prompt_token_ids)
        if pooling is not None:
            pooling = pooling.resolved(self.model_config.pooling)
        else:
            most = (
                self.max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
            )
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            params,
            seed=message.seed,
            max_total_tokens=most if pooling is not None else min(most, self.max_model_len),
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
            self._awaiting[request.request_id] = request

    def load_grammar(self, message: LoadGrammar) -> None:
        """Begin to load a grammar, beside the steps; requests may name it from now on."""
        self._grammars.take(message)

    def _admit_loaded(self) -> list[TokenOutput]:
        """Queue requests whose grammar is loaded; the outputs of those that cannot be."""
        outputs = []
        for request in [r for r in self._awaiting.values() if _grammar_of(r).is_loaded]:
            del self._awaiting[request.request_id]
            error: Exception
            try:
                _grammar_of(request).check()
                self.scheduler.add(request)
                continue
            except InvalidRequest as refused:
                error = refused
            except Exception as failed:  # whatever XGrammar raises
                logger.exception("a grammar could not be loaded")
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
        """Longest prompt plus answer, in tokens."""
        return self.scheduler.config.max_model_len

    def _check(self, message: AddRequest) -> None:
        """What the device would not survive: everything else is checked where it came in."""
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
            raise InvalidRequest(f"this model does not {task}; it does: {', '.join(self.tasks)}")
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if any(token_id >= vocab_size for token_id in ids):
                raise InvalidRequest(
                    f"{name} holds token id {max(ids)}, outside the vocabulary "
                    f"(0 to {vocab_size - 1})",
                    param=name,
                )

    def abort(self, request_ids: Sequence[str]) -> list[TokenOutput]:
        """End these requests now; the outputs of those that were live."""
        outputs = []
        for request_id in request_ids:
            awaiting = self._awaiting.pop(request_id, None)
            if awaiting is not None or self.scheduler.abort(request_id) is not None:
                self._num_prompt_logprobs_sent.pop(request_id, None)
                outputs.append(
                    TokenOutput(request_id=request_id, token_ids=[], finish_reason="abort")
                )
        return outputs

    def has_work(self) -> bool:
        """True while a request is unfinished or a step is on the device."""
        return bool(self._in_flight or self._awaiting) or self.scheduler.has_unfinished()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, changing nothing, while any request runs."""
        return self.scheduler.reset_prefix_cache()

    # -- steps --------------------------------------------------------------------------------

    def step(self) -> StepOutputs:
        """Keep the device busy, wait for its oldest step and give out what it drew.

        Raises:
            BackendError: of kind device_lost: the engine cannot go on. Any other failure of the
                device ends one request (the one with the most tokens in the step); where memory
                ran out, only if smaller steps do not fit either.
        """
        started = time.perf_counter()
        plan: StepPlan | None = None
        refused = self._admit_loaded() if self._awaiting else []
        # a step is captured while none is on the device: until all are, steps do not overlap
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
                if self._awaiting:
                    _grammar_of(next(iter(self._awaiting.values()))).wait(_GRAMMAR_WAIT_S)
                return self._outputs([], refused)
            step = self._in_flight.popleft()
            plan = step.plan
            result = step.result()
        except BackendError as error:
            if error.kind == "device_lost" or plan is None:
                raise
            return self._outputs(self._recover(plan, error), refused)
        self._num_failures = 0
        updates = self.scheduler.update(plan, result)
        self._count(plan, result, time.perf_counter() - started)
        return self._outputs(updates, refused)

    @property
    def has_captures_left(self) -> bool:
        """True while steps are still to be captured: service goes on meanwhile."""
        return self.runner.graphs.next_to_capture() is not None

    def capture_next(self) -> bool:
        """Capture one more step, if one is left and nothing is on the device; True if it was."""
        if self._in_flight or not self.has_captures_left:
            return False
        try:
            self.runner.capture_next()
        except BackendError as error:
            if error.kind == "device_lost" or self.backend.capabilities.static_shapes:
                raise
            logger.warning("no more steps are captured, others run as they are: %s", error)
            self.runner.graphs.give_up()
        if not self.has_captures_left:
            self.runner.graphs.seal()
        return True

    def _capture_all(self, tell: Progress) -> None:
        """Capture every bucket before service."""
        self.runner.capture_all(lambda share: tell("capture", share))
        self.runner.graphs.seal()
        tell("capture", 1.0)

    def _recover(self, plan: StepPlan, error: BackendError) -> list[RequestUpdate]:
        """A step failed: its largest request ends, all others are computed again.

        Sampling is stateless, so those draw the same tokens as if nothing had happened. Where
        memory ran out nobody ends before it was tried again with less of it.
        """
        self._num_failures += 1
        failed = {}
        if not (error.kind == "oom" and self._may_try_again(plan)):
            largest = max(plan.requests, key=lambda p: (p.num_tokens, p.start)).request
            reason = f"the device failed on this request ({error.kind}): {error}"
            failed[largest.request_id] = reason
        logger.error(
            "step %d failed (%s: %s); %s, %d requests are computed again",
            plan.step_id,
            error.kind,
            error,
            f"request {next(iter(failed))} ends" if failed else "no request ends",
            len(plan.requests) - len(failed),
        )
        for step in self._in_flight:  # planned on top of the failed one: their ids mean nothing
            try:
                step.result()
            except BackendError as later:
                if later.kind == "device_lost":
                    raise
        self._in_flight.clear()
        return self.scheduler.rewind(failed)

    def _may_try_again(self, plan: StepPlan) -> bool:
        """Make steps smaller, if this one can be; as it was it is tried only once again."""
        config = self.scheduler.config
        limit = max(plan.num_tokens // 2, config.max_batch_requests)
        if plan.num_tokens <= limit or not config.enable_chunked_prefill:
            return self._num_failures == 1
        logger.warning(
            "steps have at most %d tokens from now on: one of %d did not fit the device's memory "
            "(--max-num-batched-tokens and --gpu-memory-utilization leave more room)",
            limit,
            plan.num_tokens,
        )
        self.scheduler.limit_tokens(limit)
        return True

    def _outputs(self, updates: list[RequestUpdate], more: Sequence[TokenOutput]) -> StepOutputs:
        outputs = [*more, *(self._output(u) for u in updates)]
        outputs += [
            TokenOutput(request_id=request_id, token_ids=[], scheduled_time=scheduled_time)
            for request_id, scheduled_time in self._scheduled_times.items()
        ]
        self._scheduled_times.clear()
        return StepOutputs(outputs, self.stats())

    def _output(self, update: RequestUpdate) -> TokenOutput:
        request = update.request
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=update.new_token_ids,
            finish_reason=update.finish_reason,
            stop_reason=request.stop_reason if update.finish_reason else None,
            logprobs=None if update.logprobs is None else [update.logprobs],
            num_cached_tokens=request.num_cached_tokens,
            pooled=update.pooled,
            error=update.error,
            is_refused=update.is_refused,
        )
        if self._scheduled_times:
            output.scheduled_time = self._scheduled_times.pop(request.request_id, None)
        if update.prompt_logprobs:
            # a prompt that is computed again after preemption reports again: once is enough
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
        stats.generation_tokens_total += sum(token_id >= 0 for token_id in result.token_ids)
        for planned in plan.requests:
            prompt_left = planned.request.num_prompt_tokens - planned.start
            if prompt_left > 0:
                stats.prompt_tokens_total += min(prompt_left, planned.num_tokens)

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        for name, value in self.scheduler.stats().items():
            setattr(self._stats, name, value)
        self._stats.num_waiting += len(self._awaiting)
        return self._stats

    # -- start and end ------------------------------------------------------------------------

    def _num_blocks(
        self,
        model: Model,
        weights: Weights,
        spec: KVSpec | None,
        dtype: str,
        max_model_len: int,
    ) -> int | None:
        """Size of the KV pool; None for an encoder, which has none."""
        if spec is None:
            return None
        config = self.config
        is_given = config.num_gpu_blocks_override or config.kv_cache_memory_bytes
        if self.backend.capabilities.measures_memory and not is_given:
            limits = config.scheduler_config(max_model_len=max_model_len, num_blocks=2)
            activations = measured_bytes(
                lambda kv: ModelRunner(
                    model, weights, kv, self.backend, limits, enforce_eager=config.enforce_eager
                ),
                self.backend,
                spec,
            )
        else:
            activations = activation_bytes(
                self.model_config,
                dtype_bytes=_DTYPE_BYTES[dtype],
                max_tokens=config.max_num_batched_tokens,
                max_logits_rows=config.max_num_seqs + MAX_PROMPT_LOGPROB_ROWS,
            )
        budget = kv_budget(
            config,
            self.model_config,
            self.backend,
            spec,
            max_model_len=max_model_len,
            weight_bytes=model.weight_bytes,
            activations=activations,
        )
        return budget.num_blocks

    def _warm_up(self) -> None:
        """Two prompt tokens and what comes of them: a device that cannot compute fails here."""
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
            raise BackendError("kernel", f"the first step failed: {outputs[-1].error}")
        self.reset_prefix_cache()
        self._stats = EngineStats()
        self.scheduler.reset_stats()

    def close(self) -> None:
        """Wait for the device; the engine may not be used after."""
        while self._in_flight:
            self._in_flight.popleft().result()
        self.runner.graphs.unseal()  # the backend may be another engine's next
        self._grammars.close()


def _grammar_of(request: Request) -> Grammar:
    assert isinstance(request.grammar, Grammar)
    return request.grammar


def _choose_dtype(config: EngineConfig, model: ModelConfig, backend: Backend) -> str:
    claimed = backend.capabilities.dtypes
    usual = backend.capabilities.auto_dtype or model.dtype
    wanted = usual if config.dtype == "auto" else config.dtype
    if wanted in claimed:
        return wanted
    if config.dtype == "auto" and "float32" in claimed:
        logger.warning(
            "backend %s does not compute in %s, the model's dtype: using float32",
            backend.name,
            wanted,
        )
        return "float32"
    raise Unsupported(
        f"{_told(backend)} does not compute in {wanted}; it does in "
        f"{', '.join(sorted(claimed))}: choose one with --dtype"
    )


def _choose_quantization(config: EngineConfig, backend: Backend, dtype: str) -> Quantization:
    """What `config.quantization` means on this backend; `Unsupported` if it cannot."""
    if config.quantization == "none":
        return AS_CAST
    if config.quantization not in _ROUNDED:
        # float32 was asked for: the reference of all else stays at its precision
        return Quantization(keep=bool(backend.capabilities.quantizations) and dtype != "float32")
    quantization = _ROUNDED[config.quantization]
    claimed = backend.capabilities.quantizations
    for name in (quantization.layers, quantization.head):
        if name is not None and name not in claimed:
            others = [n for n, q in _ROUNDED.items() if {q.layers, q.head} <= {None, *claimed}]
            raise Unsupported(
                f"{_told(backend)} does not compute with {config.quantization} weights; "
                f"choose one of these with --quantization: {', '.join(others) or 'none'}"
            )
    return quantization


def _told(backend: Backend) -> str:
    """The backend in a message, with the device where its devices differ."""
    device = backend.capabilities.device
    return f"backend {backend.name!r}" + (f" on {device}" if device else "")


def _kv_dtype(config: EngineConfig, dtype: str) -> str:
    return dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def _choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        trained = model.pooling.max_tokens if model.encoder is not None else None
        return min(model.max_position, trained or model.max_position)
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len ({config.max_model_len}) is above what the model was made for "
            f"({model.max_position} positions): lower it, or change max_position_embeddings and "
            f"rope_scaling with --hf-overrides"
        )
    return config.max_model_len


def _check_claims(config: EngineConfig, model: Model, backend: Backend, dtype: str) -> None:
    """Raise `Unsupported` at start-up for what the backend does not claim."""
    claims = backend.capabilities
    if not model.attention_specs():
        return  # what follows is about the KV cache
    kv_dtype = _kv_dtype(config, dtype)
    if kv_dtype not in claims.kv_dtypes:
        raise Unsupported(
            f"{_told(backend)} does not keep keys and values in {kv_dtype}; it does in "
            f"{', '.join(sorted(claims.kv_dtypes))}: choose one with --kv-cache-dtype"
        )
    if claims.block_sizes is not None and config.block_size not in claims.block_sizes:
        raise Unsupported(
            f"{_told(backend)} has no KV blocks of {config.block_size} tokens; it has "
            f"{', '.join(map(str, sorted(claims.block_sizes)))}: choose one with --block-size"
        )
    for spec in model.attention_specs():
        sizes = claims.head_sizes if spec.value_size is None else None  # else kv_alloc refuses
        if sizes is not None and spec.head_size not in sizes:
            raise Unsupported(
                f"{_told(backend)} has no attention for head size {spec.head_size}; it "
                f"has {', '.join(map(str, sorted(sizes)))}"
            )
        for feature, is_wanted in (
            ("sliding_window", spec.sliding_window is not None),
            ("soft_cap", spec.soft_cap is not None),
            ("alibi", spec.alibi_slopes is not None),
            ("sinks", spec.has_sinks),
            ("shared_values", spec.value_size is not None),
        ):
            if is_wanted and feature not in claims.features:
                raise Unsupported(
                    f"the model needs {feature}, which {_told(backend)} does not claim"
                )
