"""The client side of an engine: requests in, streams of answer deltas out, whatever becomes of it.

The engine runs in a process of its own. If that ends, or hangs in a step, a new one is started and
every request goes on behind the tokens that it has: sampling is a function of seed and position, so
the answers are those of a run that nothing disturbed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import zmq

from portalm.config import EngineConfig, Task
from portalm.engine.grammars import LoadedGrammars, vocabulary_of
from portalm.engine.inbox import Inbox
from portalm.engine.input_processor import InputProcessor, ProcessedInput, TextPair
from portalm.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStats,
    Probe,
    ProbeAnswer,
    ResetPrefixCache,
    StepOutputs,
    TokenOutput,
)
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.engine.process import EngineProcess
from portalm.engine.pulse import Sign
from portalm.engine.suspects import Suspects
from portalm.errors import (
    EngineDead,
    EngineNotReady,
    InvalidRequest,
    PortaLMError,
    QueueTimeout,
)
from portalm.logs import LogConfig
from portalm.models.hub import resolve_model
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm.structured.compiler import GrammarCompiler
from portalm.structured.messages import CompiledGrammar
from portalm.text import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
"""Between two looks at whether the engine hangs."""

_LOOK_AGAIN_S = 0.05

_MAX_FRUITLESS_STARTS = 10
"""Engines in a row that end before they give out a token, until no other is started: enough to find
the one request out of hundreds that ends them."""

_LONG_TEXT = 4096
"""Characters from which on a thread of its own tokenises them: that takes milliseconds."""

T = TypeVar("T")


class EngineClient:
    """An engine in its own process. All methods belong to one event loop.

    Detokenising and stop strings are done here, so that the engine never waits for text.
    """

    def __init__(self, config: EngineConfig, *, logs: LogConfig | None = None) -> None:
        """Nothing runs before `start`.

        Args:
            config: what the engine runs, where.
            logs: how the engine's process writes its log; None: the defaults.
        """
        self.config = config
        self._logs = logs or LogConfig()
        self.ready: EngineReady | None = None
        """What the engine said when it had loaded; None before that."""
        self.stats = EngineStats()
        self.last_news_time = 0.0
        """time.monotonic() of the engine's last message."""
        self.num_restarts = 0
        self.steps_by_tokens: Counter[int] = Counter()
        """How many steps computed so many tokens (no more keys than a step may have tokens)."""
        self._folder = Path(tempfile.mkdtemp(prefix="portalm-"))  # only this user may enter it
        self._context = zmq.Context()
        self._process: EngineProcess | None = None
        self._is_loaded = False
        """The process takes requests."""
        self._num_processes = 0
        self._num_fruitless = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._inboxes: dict[str, Inbox] = {}
        """By the caller's request id."""
        self._open: dict[str, AddRequest] = {}
        """By engine-side id: answers that have not ended, as they were first asked for."""
        self._grammars: dict[str, CompiledGrammar] = {}
        """By engine-side id: of those answers that match one."""
        self._loaded_grammars = LoadedGrammars()
        self._queued: dict[str, int] = {}
        """By engine-side id: answers that have not begun to run, and the prompt tokens of each."""
        self.num_queued_tokens = 0
        """Prompt tokens that wait; answers that share a prompt count it once."""
        self._suspects = Suspects()
        self._work_since = 0.0
        """When the engine last got work after it had none."""
        self._totals: dict[str, int] = {}
        """Of the engines before this one, so that counters only grow."""
        self._probes: list[asyncio.Future[ProbeAnswer]] = []
        self._dead: EngineDead | None = None

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Start the process and wait until its model is loaded.

        Raises:
            PortaLMError: it could not start; the text is the engine's own.
        """
        # fetched here, once, so that the engine and the tokenizer find it in the cache
        path = await asyncio.to_thread(
            resolve_model, self.config.tokenizer or self.config.model, revision=self.config.revision
        )
        process = await self._new_process()
        self._tokenizer = await asyncio.to_thread(
            load_tokenizer,
            path,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
        )
        self._outputs = OutputProcessor(self._tokenizer)
        ready = await process.ready()
        self._inputs = InputProcessor(
            self._tokenizer,
            ready,
            max_logprobs=self.config.max_logprobs,
            default_seed=self.config.seed,
        )
        self._compiler = GrammarCompiler(lambda: vocabulary_of(self._tokenizer, ready))
        self.ready, self._is_loaded = ready, True
        self.last_news_time = time.monotonic()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch())]
        return ready

    async def shutdown(self, *, at_once: bool = False) -> None:
        """End the process: ask it, then terminate it, then kill it. Streams end as dead.

        Args:
            at_once: kill it.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._die("the engine was shut down")
        if self.ready is not None:
            self._compiler.close()
        if self._process is not None:
            if at_once or not self._is_loaded:  # it does not listen yet
                self._process.kill()
            await self._process.end()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_alive(self) -> bool:
        """The engine has started and takes requests; False while another one is being started."""
        return (
            self._dead is None
            and self._is_loaded
            and self._process is not None
            and self._process.is_running
        )

    @property
    def progress(self) -> EngineProgress | None:
        """How far the engine is that is being started; None: none is, or it said nothing yet."""
        return None if self._process is None or self._is_loaded else self._process.progress

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
        """Some answer has not ended (one that has may still be on its way to a slow reader)."""
        return bool(self._open)

    @property
    def num_queued(self) -> int:
        """Answers that were asked for and have not begun to run: exact at any moment."""
        return len(self._queued)

    async def health_problem(self, *, timeout_s: float = 5.0) -> str | None:
        """What is wrong with the engine; None: it makes progress, or is idle and its device well.

        Args:
            timeout_s: how long an idle engine's device may take to answer.
        """
        if self._dead is not None:
            return f"the engine has ended: {self._dead}"
        if not self.is_alive:
            loading = "the model is being loaded"
            return loading if self.ready is None else "the engine has ended and is being restarted"
        assert self._process is not None
        if self._overdue_s() > 0:
            await asyncio.sleep(_LOOK_AGAIN_S)  # the numbers may have been half written
        overdue_s = self._overdue_s() if self.is_alive else 0.0
        if overdue_s > 0:
            return f"the engine's step is {overdue_s:.1f} s past its deadline"
        sign = self._process.pulse.read()
        if sign.num_tokens or self._suspects.in_flight:
            return None  # at work, within its time
        answered: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
        self._probes.append(answered)
        self._process.send(Probe(timeout_s))
        try:
            answer = await asyncio.wait_for(answered, timeout_s + 1.0)
        except asyncio.TimeoutError:
            if self._process.pulse.read() != sign:
                return None  # work came in between: it is judged by its own time
            return f"the idle engine did not answer in {timeout_s:.0f} s"
        return answer.error

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
    ) -> ProcessedInput:
        """What `generate` will ask the engine; waits until its grammar is compiled, if it has one.

        A long text is tokenised in a thread, while others go on.

        Args:
            request_id: unique among open requests.
            prompt: text or token ids.
            params: how to answer.
            priority: lower runs first, where the policy is priority.
            cache_salt: cached blocks are shared between requests of equal salt.
            tenant: whose it is.
            add_special_tokens: put what the model wants around a text (BOS, say).

        Raises:
            InvalidRequest: it can never be answered.
            CompilersBusy: too many grammars wait to be compiled.
            EngineNotReady: the model is not loaded yet.
        """
        self._check_id(request_id)
        grammar = None
        if params.structured_outputs is not None:
            compiling = self._compiler.compile(params.structured_outputs)
            # others may wait for the same grammar: who leaves must not cancel it
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
        """What `generate` will ask the engine for a vector or a score; errors as of `check`."""
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

    def does(self, task: Task) -> bool:
        """Whether the model, once it is loaded, does `task`."""
        return self.ready is not None and task in self.ready.tasks

    def check_task(self, task: Task) -> None:
        """Raise `InvalidRequest` if the model, once it is loaded, does not do `task`."""
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
        """Token ids of a text that a prompt could hold.

        Raises:
            InvalidRequest: it is longer, or no valid Unicode.
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
        """The answers to some requests, piece by piece as they come, until the last has ended.

        Closing or cancelling the iterator aborts what is left of the requests. The engine is asked
        before this first waits.

        Args:
            inputs: as `check` gave them.
            params: that they were checked with.
            queue_timeout_s: how long they may wait until the first of them runs; None: for ever.

        Raises:
            EngineDead: the engine ended, and no other could be started.
            InvalidRequest: one of their ids is in use.
            QueueTimeout: none of them began to run in time.
        """
        if self._dead is not None:
            raise self._dead
        inbox = Inbox()
        ids = self._take_in(inputs, params, inbox)
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
            self._let_go(inputs)

    def cut_off(self) -> None:
        """End every open answer with what it has so far: its finish reason is abort."""
        if ids := [*self._open]:
            aborted = [TokenOutput(request_id=i, token_ids=[], finish_reason="abort") for i in ids]
            self._hand_over(aborted)
            self._abort(ids)

    async def reset_prefix_cache(self) -> None:
        """Forget cached blocks that nobody holds."""
        if self.is_alive:
            assert self._process is not None
            self._process.send(ResetPrefixCache())

    # -- inside -------------------------------------------------------------------------------

    async def _new_process(self) -> EngineProcess:
        self._num_processes += 1
        self._process = EngineProcess(
            self._context, self._folder, self._num_processes, logs=self._logs
        )
        self._loaded_grammars = LoadedGrammars()
        await self._process.start(self.config)
        return self._process

    def _take_in(
        self, inputs: Sequence[ProcessedInput], params: SamplingParams, inbox: Inbox
    ) -> list[str]:
        """Expect the answers to `inputs`, to all or to none; their engine-side ids."""
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

    def _let_go(self, inputs: Sequence[ProcessedInput]) -> None:
        """Nobody waits for `inputs` any more: what is left of them ends."""
        open_ids: list[str] = []
        for one in inputs:
            del self._inboxes[one.request_id]
            open_ids += self._outputs.engine_ids(one.request_id)
            self._outputs.forget(one.request_id)
        self._close(open_ids)
        self._abort(open_ids)

    def _expire(self, request_ids: Sequence[str], inbox: Inbox, queue_timeout_s: float) -> None:
        if all(request_id in self._queued for request_id in request_ids):
            inbox.fail(
                QueueTimeout(
                    f"the request waited {queue_timeout_s:g} s in the queue, behind others, and "
                    f"did not begin to run: try again later"
                )
            )

    def _submit(self, request_ids: Iterable[str]) -> None:
        """Ask the engine for those of these open answers that may be asked for now."""
        if not self.is_alive:
            return  # once another engine has loaded
        assert self._process is not None
        if not self._suspects.in_flight:
            self._work_since = time.monotonic()
        for request_id in self._suspects.next(request_ids):
            if (grammar := self._grammars.get(request_id)) is not None:
                load = self._loaded_grammars.need(grammar, self._compiler.vocabulary)
                if load is not None:
                    self._process.send(load)
            self._process.send(self._outputs.resumed(self._open[request_id]))

    def _abort(self, request_ids: list[str]) -> None:
        if request_ids and self.is_alive:
            assert self._process is not None
            self._process.send(AbortRequests(request_ids))

    def _close(self, request_ids: Sequence[str]) -> None:
        """These answers are over."""
        for request_id in request_ids:
            self._open.pop(request_id, None)
            self._grammars.pop(request_id, None)
            self._leave_queue(request_id)
            self._suspects.ended(request_id)

    def _leave_queue(self, request_id: str) -> None:
        self.num_queued_tokens -= self._queued.pop(request_id, 0)

    async def _supervise(self) -> None:
        """Hand out the engine's news; when it has ended, start another."""
        try:
            await self._keep_running()
        except Exception as error:  # whatever it is, nobody may wait for ever
            logger.exception("the engine's client failed")
            self._die(f"the engine's client failed: {type(error).__name__}: {error}")

    async def _keep_running(self) -> None:
        while True:
            assert self._process is not None
            reason = await self._read(self._process)
            self._is_loaded = False
            await self._process.end()
            self._totals = {
                name: getattr(self.stats, name)
                for name in self.stats.__struct_fields__
                if name.endswith("_total")
            }
            self._blame(reason)
            stats = self.stats  # nothing runs, and no block holds anything
            stats.num_running = stats.num_used_blocks = stats.num_cached_blocks = 0
            stats.num_waiting = len(self._open)
            if not await self._start_another(reason):
                return
            self._is_loaded = True
            self.num_restarts += 1
            self.last_news_time = time.monotonic()
            self._submit(self._open)

    async def _start_another(self, reason: str) -> bool:
        """Another engine has loaded; False: there is none, and none will be.

        One that is killed while it loads is followed by the next; one that says why it cannot start
        would only say it again.
        """
        while self._num_fruitless < _MAX_FRUITLESS_STARTS:
            logger.error(
                "%s: starting another engine; %d answers will go on", reason, len(self._open)
            )
            self._num_fruitless += 1
            process = await self._new_process()
            try:
                self.ready = await process.ready()
                return True
            except EngineDead as error:
                reason = str(error)
                await process.end()
            except PortaLMError as error:
                self._die(f"{reason}; another could not be started: {error}")
                return False
        self._die(f"{reason}; {self._num_fruitless} engines in a row ended without a token")
        return False

    async def _read(self, process: EngineProcess) -> str:
        """Hand out the engine's news until it ends; why it did."""
        while True:
            message = await process.receive()
            if message is None:
                return "the engine process ended"
            self.last_news_time = time.monotonic()
            if isinstance(message, EngineFailed):
                return message.message
            if isinstance(message, ProbeAnswer):
                if self._probes and not (probe := self._probes.pop(0)).done():
                    probe.set_result(message)
            elif isinstance(message, StepOutputs):
                if any(one.token_ids or one.pooled for one in message.outputs):
                    self._num_fruitless = 0
                self._count(message.stats)
                for one in message.outputs:
                    if one.scheduled_time is not None:
                        self._leave_queue(one.request_id)
                self._hand_over(message.outputs)
                if held := self._suspects.held:
                    self._submit(held)

    def _hand_over(self, outputs: Sequence[TokenOutput]) -> None:
        """Give the callers what the engine said; end what a stop string ended."""
        processed = self._outputs.process(outputs)
        ended = [one.request_id for one in outputs if one.finish_reason is not None]
        self._close([*ended, *processed.abort_ids])
        for delta in processed.deltas:
            inbox = self._inboxes.get(delta.request_id)
            if inbox is not None:
                inbox.put(delta)
        self._abort(processed.abort_ids)

    def _count(self, stats: EngineStats) -> None:
        for name, before in self._totals.items():
            setattr(stats, name, getattr(stats, name) + before)
        if stats.steps_total > self.stats.steps_total:  # not only news of an abort
            self.steps_by_tokens[stats.last_step_tokens] += 1
        self.stats = stats

    def _blame(self, reason: str) -> None:
        """An engine has ended: whoever ended it before, and alone, fails."""
        for probe in self._probes:
            if not probe.done():
                probe.set_result(ProbeAnswer(f"{reason}: another one is being started"))
        self._probes.clear()
        for request_id in self._suspects.engine_ended():
            logger.error("request %s ended the engine again, by itself: it fails", request_id)
            self._hand_over(
                [
                    TokenOutput(
                        request_id=request_id,
                        token_ids=[],
                        finish_reason="error",
                        error=f"request {request_id!r} ended the engine three times, at last by "
                        f"itself ({reason}): it is not tried again",
                    )
                ]
            )

    def _overdue_s(self) -> float:
        assert self._process is not None
        work_since = self._work_since if self._suspects.in_flight else None
        return self._process.pulse.read().overdue_s(work_since=work_since)

    async def _watch(self) -> None:
        """End an engine that hangs in a step: `_supervise` starts another."""
        before: Sign | None = None
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self.is_alive or (overdue_s := self._overdue_s()) <= 0:
                before = None
                continue
            assert self._process is not None
            sign, last = self._process.pulse.read(), before
            before = sign
            if sign == last:  # seen twice: not numbers that were half written
                logger.error(
                    "step %d, of %d tokens, is %.1f s past its deadline of %.0f s: the engine is "
                    "ended",
                    sign.num_steps,
                    sign.num_tokens,
                    overdue_s,
                    sign.deadline_s,
                )
                self._process.kill()

    def _die(self, reason: str) -> None:
        if self._dead is None:
            self._dead = EngineDead(reason)
        for inbox in self._inboxes.values():
            inbox.fail(self._dead)


async def _off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """`work()`, which tokenises so many characters, while others go on."""
    if num_chars >= _LONG_TEXT:
        return await asyncio.to_thread(work)
    await asyncio.sleep(0)  # many short ones, one after the other, take long too
    return work()
