"""The client side of an engine: requests in, streams of answer deltas out.

The engine runs in a process of its own (see `Supervisor`). When it crashes or hangs, another one is
started and every open request continues from the tokens it has. Sampling depends only on the seed
and the position, so the answers are the same as without the crash.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TypeVar

from portalm.config import EngineConfig, Task
from portalm.engine.grammars import vocabulary_of
from portalm.engine.inbox import Inbox
from portalm.engine.input_processor import InputProcessor, ProcessedInput, TextPair
from portalm.engine.messages import (
    AddRequest,
    EngineProgress,
    EngineReady,
    EngineStats,
    StepOutputs,
    TokenOutput,
)
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.engine.supervisor import EngineCrashed, EngineEvent, Supervisor
from portalm.errors import EngineDead, EngineNotReady, InvalidRequest, QueueTimeout
from portalm.logs import LogConfig
from portalm.models.hub import resolve_model
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm.structured.compiler import GrammarCompiler
from portalm.structured.messages import CompiledGrammar
from portalm.text import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_LONG_TEXT = 4096
"""Characters from which a text is tokenized in a thread: it takes milliseconds."""

T = TypeVar("T")


class EngineClient:
    """An engine in its own process. All methods belong to one event loop.

    Detokenization and stop strings are handled here, so that the engine never waits for text.
    """

    def __init__(self, config: EngineConfig, *, logs: LogConfig | None = None) -> None:
        """Keep the settings. Nothing runs before `start`.

        Args:
            config: settings of the engine.
            logs: log format and level of the engine's process; None: the defaults.
        """
        self.config = config
        self.ready: EngineReady | None = None
        """What the latest engine reported when it had loaded; None before the first has."""
        self._supervisor = Supervisor(config, logs=logs or LogConfig())
        self._receiver: asyncio.Task[None] | None = None
        self._inboxes: dict[str, Inbox] = {}
        """By the caller's request id."""
        self._open: dict[str, AddRequest] = {}
        """Answers that have not ended, as first sent to the engine, by engine-side id."""
        self._grammars: dict[str, CompiledGrammar] = {}
        """Grammars of open answers, by engine-side id."""
        self._queued: dict[str, int] = {}
        """Prompt tokens of the answers that have not begun to run, by engine-side id."""
        self.num_queued_tokens = 0
        """Prompt tokens in the queue; answers that share a prompt count it once."""
        self._dead: EngineDead | None = None

    # -- life cycle ---------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Start the engine process and wait until its model is loaded.

        Raises:
            PortaLMError: it could not start; the text is the engine's own.
        """
        # downloaded here, once, so that the engine and the tokenizer find it in the cache
        path = await asyncio.to_thread(
            resolve_model, self.config.tokenizer or self.config.model, revision=self.config.revision
        )
        await self._supervisor.start()
        self._tokenizer = await asyncio.to_thread(
            load_tokenizer,
            path,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
        )
        self._outputs = OutputProcessor(self._tokenizer)
        ready = await self._supervisor.wait_ready()
        self._inputs = InputProcessor(
            self._tokenizer,
            ready,
            max_logprobs=self.config.max_logprobs,
            default_seed=self.config.seed,
        )
        self._compiler = GrammarCompiler(lambda: vocabulary_of(self._tokenizer, ready))
        self.ready = ready
        self._receiver = asyncio.create_task(self._receive())
        return ready

    async def shutdown(self, *, at_once: bool = False) -> None:
        """Stop the engine process; open streams raise `EngineDead`.

        Args:
            at_once: kill it; otherwise it gets a message and a SIGTERM first.
        """
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
        self._fail_all(EngineDead("the engine was shut down"))
        if self.ready is not None:
            self._compiler.close()
        await self._supervisor.shutdown(at_once=at_once)

    @property
    def is_alive(self) -> bool:
        """The engine has loaded and takes requests; False during a restart."""
        return self._dead is None and self._supervisor.is_alive

    @property
    def progress(self) -> EngineProgress | None:
        """Progress of the engine being loaded; None if none is, or it has not reported yet."""
        return self._supervisor.progress

    @property
    def stats(self) -> EngineStats:
        """The engine's latest statistics; those named total are kept across restarts."""
        return self._supervisor.stats

    @property
    def num_restarts(self) -> int:
        """Engines started after a crash that have loaded."""
        return self._supervisor.num_restarts

    @property
    def steps_by_tokens(self) -> Counter[int]:
        """Number of steps by the number of tokens they computed."""
        return self._supervisor.steps_by_tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `EngineNotReady` before it is loaded."""
        self._check_ready()
        return self._tokenizer

    @property
    def num_open(self) -> int:
        """Requests whose answers have not ended."""
        return len(self._inboxes)

    @property
    def has_open_answers(self) -> bool:
        """Some answer has not ended; one that has may still wait for a slow reader."""
        return bool(self._open)

    @property
    def num_queued(self) -> int:
        """Answers that have not begun to run."""
        return len(self._queued)

    async def health_problem(self, *, timeout_s: float = 5.0) -> str | None:
        """Describe what is wrong with the engine; None if it is healthy.

        Args:
            timeout_s: seconds that an idle engine's device may take to answer.
        """
        if self._dead is not None:
            return f"the engine has ended: {self._dead}"
        return await self._supervisor.health_problem(timeout_s=timeout_s)

    # -- requests -----------------------------------------------------------------------------

    async def check(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> ProcessedInput:
        """Check a request and prepare it for `generate`. Waits until its grammar is compiled.

        A long text is tokenized in a thread, so that other requests are not delayed.

        Args:
            request_id: unique among open requests.
            prompt: text or token ids.
            params: sampling parameters.
            priority: lower runs first, if the scheduling policy is "priority".
            cache_salt: cached blocks are shared only between requests with the same salt.
            tenant: name of the tenant that the request belongs to.
            add_special_tokens: add the model's special tokens (BOS, for example) to a text.
            truncate_prompt_tokens: keep only this many of the prompt's last tokens; -1: as many
                as leave room for the answer.

        Raises:
            InvalidRequest: the request can never be answered.
            CompilersBusy: too many grammars are waiting to be compiled.
            EngineNotReady: the model is not loaded yet.
        """
        self._check_id(request_id)
        grammar = None
        if params.structured_outputs is not None:
            compiling = self._compiler.compile(params.structured_outputs)
            # several requests may wait for one grammar: a disconnect must not cancel it for all
            grammar = await asyncio.shield(asyncio.wrap_future(compiling))
        process = functools.partial(
            self._inputs.process,
            request_id,
            prompt,
            params,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            grammar=grammar,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        return await _off_loop(len(prompt), process)

    async def check_pooling(
        self,
        request_id: str,
        prompt: str | Sequence[int] | TextPair,
        params: PoolingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
    ) -> ProcessedInput:
        """Check a request for a vector or a score, and prepare it for `generate`.

        Arguments and errors are those of `check`.
        """
        self._check_id(request_id)
        process = functools.partial(
            self._inputs.process_pooling,
            request_id,
            prompt,
            params,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        return await _off_loop(len(prompt), process)

    def supports(self, task: Task) -> bool:
        """Whether the model supports `task`; False until it is loaded."""
        return self.ready is not None and task in self.ready.tasks

    def check_task(self, task: Task) -> None:
        """Raise `InvalidRequest` if the model is loaded and does not support `task`."""
        if self.ready is not None:
            self._inputs.check_task(task)

    def _check_ready(self) -> None:
        if self.ready is None:
            raise EngineNotReady("the model is being loaded: try again in a moment")

    def _check_id(self, request_id: str) -> None:
        self._check_ready()
        if request_id in self._inboxes:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that is no longer than a prompt may be.

        Raises:
            InvalidRequest: the text is longer, or not valid Unicode.
            EngineNotReady: the model is not loaded yet.
        """
        self._check_ready()
        encode = functools.partial(self._inputs.encode, text, add_special_tokens=add_special_tokens)
        return await _off_loop(len(text), encode)

    async def generate(
        self,
        inputs: Sequence[ProcessedInput],
        params: SamplingParams,
        *,
        queue_timeout_s: float | None = None,
    ) -> AsyncGenerator[AnswerDelta, None]:
        """Yield the answers to some requests, delta by delta, until the last has ended.

        The requests are sent to the engine before the first wait. Closing or cancelling the
        iterator aborts those that have not ended.

        Args:
            inputs: from `check` or `check_pooling`.
            params: the same that were checked.
            queue_timeout_s: seconds until the first of them must have begun to run; None: no limit.

        Raises:
            EngineDead: the engine ended, and no other could be started.
            InvalidRequest: one of the request ids is in use.
            QueueTimeout: none of them began to run in time.
        """
        if self._dead is not None:
            raise self._dead
        inbox = Inbox()
        ids = self._register(inputs, params, inbox)
        timer = None
        if queue_timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(
                queue_timeout_s, self._expire, ids, inbox, queue_timeout_s
            )
        num_open = len(inputs)
        try:
            self._submit(ids)
            while num_open:
                delta = await inbox.get()
                num_open -= delta.is_last
                yield delta
        finally:
            if timer is not None:
                timer.cancel()
            self._release(inputs)

    def abort_all(self) -> None:
        """End every open answer with the tokens it has; its finish reason is "abort"."""
        if ids := [*self._open]:
            aborted = [TokenOutput(request_id=i, token_ids=[], finish_reason="abort") for i in ids]
            self._deliver(aborted)
            self._supervisor.abort(ids)

    async def reset_prefix_cache(self) -> None:
        """Drop cached blocks; the engine refuses while requests run."""
        self._supervisor.reset_prefix_cache()

    # -- inside -------------------------------------------------------------------------------

    def _register(
        self, inputs: Sequence[ProcessedInput], params: SamplingParams, inbox: Inbox
    ) -> list[str]:
        """Expect the answers to all `inputs`, or to none; return their engine-side ids."""
        now = time.time()
        for i, one in enumerate(inputs):
            try:
                self._outputs.add(one, params, arrival_time=now)
            except InvalidRequest:
                for before in inputs[:i]:
                    self._outputs.forget(before.request_id)
                raise
        ids = []
        for one in inputs:
            self._inboxes[one.request_id] = inbox
            if one.grammar is not None:
                self._grammars.update((m.request_id, one.grammar) for m in one.requests)
            num_tokens = len(one.prompt_token_ids)
            for message in one.requests:
                self._open[message.request_id] = message
                self._queued[message.request_id] = num_tokens
                self.num_queued_tokens += num_tokens
                ids.append(message.request_id)
                num_tokens = 0  # the other answers share the prompt
        return ids

    def _release(self, inputs: Sequence[ProcessedInput]) -> None:
        """Forget `inputs`, and abort their answers that have not ended."""
        open_ids: list[str] = []
        for one in inputs:
            del self._inboxes[one.request_id]
            open_ids += self._outputs.engine_ids(one.request_id)
            self._outputs.forget(one.request_id)
        self._close(open_ids)
        self._supervisor.abort(open_ids)

    def _expire(self, request_ids: Sequence[str], inbox: Inbox, queue_timeout_s: float) -> None:
        if all(request_id in self._queued for request_id in request_ids):
            inbox.fail(
                QueueTimeout(
                    f"the request waited {queue_timeout_s:g} s in the queue without starting: "
                    f"try again later"
                )
            )

    def _submit(self, request_ids: Iterable[str]) -> None:
        """Send the engine those of these open answers that may run now."""
        for request_id in self._supervisor.admit(request_ids):
            if (grammar := self._grammars.get(request_id)) is not None:
                self._supervisor.load_grammar(grammar, self._compiler.vocabulary)
            self._supervisor.add(self._outputs.resumed(self._open[request_id]))

    def _close(self, request_ids: Sequence[str]) -> None:
        """Forget answers that have ended."""
        for request_id in request_ids:
            self._open.pop(request_id, None)
            self._grammars.pop(request_id, None)
            self._leave_queue(request_id)
            self._supervisor.forget(request_id)

    def _leave_queue(self, request_id: str) -> None:
        self.num_queued_tokens -= self._queued.pop(request_id, 0)

    async def _receive(self) -> None:
        """Deliver the engine's outputs, across restarts, until no engine can be started."""
        try:
            async for event in self._supervisor.events():
                self._handle(event)
        except EngineDead as error:
            self._fail_all(error)
        except Exception as error:  # whatever it is, no stream may wait forever
            logger.exception("the engine's client failed")
            self._fail_all(
                EngineDead(f"the engine's client failed: {type(error).__name__}: {error}")
            )

    def _handle(self, event: EngineEvent) -> None:
        if isinstance(event, StepOutputs):
            for output in event.outputs:
                if output.scheduled_time is not None:
                    self._leave_queue(output.request_id)
            self._deliver(event.outputs)
            self._submit(self._supervisor.held)
        elif isinstance(event, EngineCrashed):
            self._deliver(
                [
                    TokenOutput(
                        request_id=request_id,
                        token_ids=[],
                        finish_reason="error",
                        error=f"request {request_id!r} crashed the engine repeatedly "
                        f"({event.reason}): it is not retried",
                    )
                    for request_id in event.failed_ids
                ]
            )
            self.stats.num_waiting = len(self._open)
        else:
            self.ready = event.ready
            self._submit(self._open)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Pass outputs on to the streams, and end the answers that a stop string ended."""
        processed = self._outputs.process(outputs)
        ended = [output.request_id for output in outputs if output.finish_reason is not None]
        self._close([*ended, *processed.abort_ids])
        for delta in processed.deltas:
            inbox = self._inboxes.get(delta.request_id)
            if inbox is not None:
                inbox.put(delta)
        self._supervisor.abort(processed.abort_ids)

    def _fail_all(self, error: EngineDead) -> None:
        """Raise `error` in every open stream, and in those of later calls."""
        if self._dead is None:
            self._dead = error
        for inbox in self._inboxes.values():
            inbox.fail(self._dead)


async def _off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Run `work`, which tokenizes `num_chars` characters, without blocking the event loop long."""
    if num_chars >= _LONG_TEXT:
        return await asyncio.to_thread(work)
    await asyncio.sleep(0)  # lets other tasks run between many short texts
    return work()
