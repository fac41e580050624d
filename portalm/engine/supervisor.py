"""Keep one engine process running: start it, watch it, probe it, and replace it when it crashes.

A crash does not say which request caused it. `Suspects` limits which requests run at once after
repeated crashes, until the one that crashes the engine runs alone and can be failed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import zmq

from portalm.config import EngineConfig
from portalm.engine.grammars import LoadedGrammars
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
)
from portalm.engine.process import EngineProcess
from portalm.engine.pulse import PulseReading
from portalm.engine.suspects import Suspects
from portalm.errors import EngineDead, PortaLMError
from portalm.logs import LogConfig
from portalm.structured.messages import CompiledGrammar, LoadGrammar, Vocabulary

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
"""Seconds between two checks for an overdue step."""

_REREAD_S = 0.05
"""Seconds before an overdue pulse is read a second time: the first read may have been torn."""

_MAX_FRUITLESS_STARTS = 10
"""Consecutive engines that may crash before their first token; then no other is started. Enough to
bisect a few hundred requests down to the one that crashes the engine."""


@dataclass(frozen=True, slots=True)
class EngineCrashed:
    """The engine process ended; a new one is started next."""

    reason: str
    failed_ids: list[str]
    """Engine-side ids of requests that crash the engine: they are not retried."""


@dataclass(frozen=True, slots=True)
class EngineRestarted:
    """A new engine has loaded. No request has been sent to it yet."""

    ready: EngineReady


EngineEvent: TypeAlias = StepOutputs | EngineCrashed | EngineRestarted


class Supervisor:
    """One engine that survives crashes. All methods belong to one event loop.

    A request is known here by its engine-side id only. `admit` returns the requests that may run
    now, `add` sends them, `forget` drops them, and `events` yields what the engine does.
    """

    def __init__(self, config: EngineConfig, *, logs: LogConfig) -> None:
        """Create the private folder of the sockets. No process runs before `start`.

        Args:
            config: settings of the engine.
            logs: log format and level of the engine's process.
        """
        self._config = config
        self._logs = logs
        self.stats = EngineStats()
        """Latest statistics; those named total are summed over all engines so far."""
        self.num_restarts = 0
        self.steps_by_tokens: Counter[int] = Counter()
        """Number of steps by the number of tokens they computed."""
        self._folder = Path(tempfile.mkdtemp(prefix="portalm-"))  # mode 0700
        self._context = zmq.Context()
        self._process: EngineProcess | None = None
        self._is_loaded = False
        """The current process has loaded its model and takes requests."""
        self._has_loaded = False
        """Some process has loaded its model."""
        self._num_processes = 0
        self._num_fruitless_starts = 0
        self._watcher: asyncio.Task[None] | None = None
        self._crash_reason = ""
        """Why the last engine crashed; empty while one runs."""
        self._suspects = Suspects()
        self._loaded_grammars = LoadedGrammars()
        self._work_since = 0.0
        """time.monotonic() when the engine last got a request while it had none."""
        self._totals: dict[str, int] = {}
        """Final counters of earlier engines, added to the current one's."""
        self._probes: list[asyncio.Future[ProbeAnswer]] = []

    # -- life cycle ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the first process. It loads its model while the caller does other work."""
        await self._start_process()

    async def wait_ready(self) -> EngineReady:
        """Wait until the first process has loaded its model, and start to watch it.

        Raises:
            PortaLMError: it could not start; the text is the engine's own.
        """
        assert self._process is not None
        ready = await self._process.ready()
        self._is_loaded = self._has_loaded = True
        self._watcher = asyncio.create_task(self._watch())
        return ready

    async def shutdown(self, *, at_once: bool = False) -> None:
        """Stop the process (by message, then SIGTERM, then SIGKILL) and remove its folder.

        Args:
            at_once: send SIGKILL first.
        """
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._process is not None:
            if at_once or not self._is_loaded:  # a loading engine reads no messages
                self._process.kill("the client shut down")
            await self._process.end()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        """Yield step outputs; after a crash, `EngineCrashed` and then `EngineRestarted`.

        The new engine is started when the caller waits for the event after `EngineCrashed`.

        Raises:
            EngineDead: no new engine could be started.
        """
        assert self._process is not None
        while True:
            message = await self._receive(self._process)
            if isinstance(message, StepOutputs):
                yield message
                continue
            self._is_loaded = False
            self._crash_reason = message.message
            await self._process.end()
            yield self._after_crash(message.message)
            ready = await self._restart(message.message)
            self._is_loaded = True
            self._crash_reason = ""
            self.num_restarts += 1
            yield EngineRestarted(ready)

    @property
    def is_alive(self) -> bool:
        """The engine has loaded and takes requests; False during a restart."""
        return self._is_loaded and self._process is not None and self._process.is_running

    @property
    def progress(self) -> EngineProgress | None:
        """Progress of the engine being loaded; None if none is, or it has not reported yet."""
        return None if self._process is None or self._is_loaded else self._process.progress

    async def health_problem(self, *, timeout_s: float) -> str | None:
        """Describe what is wrong with the engine; None if it is healthy.

        A busy engine is healthy while its step is within its deadline, an idle one if its device
        answers a probe.

        Args:
            timeout_s: seconds that an idle engine's device may take to answer.
        """
        if not self.is_alive:
            if not self._has_loaded:
                return "the model is being loaded"
            reason = self._crash_reason and f": {self._crash_reason}"
            return f"the engine crashed and is being restarted{reason}"
        assert self._process is not None
        if self._overdue_s() > 0:
            await asyncio.sleep(_REREAD_S)
        overdue_s = self._overdue_s() if self.is_alive else 0.0
        if overdue_s > 0:
            return f"the engine's step is {overdue_s:.1f} s past its deadline"
        reading = self._process.pulse.read()
        if reading.num_tokens or self._suspects.in_flight:
            return None
        answered: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
        self._probes.append(answered)
        self._process.send(Probe(timeout_s))
        try:
            answer = await asyncio.wait_for(answered, timeout_s + 1.0)
        except asyncio.TimeoutError:
            if self._process.pulse.read() != reading:
                return None  # a step began meanwhile: its own deadline applies
            return f"the idle engine did not answer a probe within {timeout_s:.0f} s"
        return answer.error

    # -- requests -----------------------------------------------------------------------------

    @property
    def held(self) -> list[str]:
        """Ids that `admit` held back: offer them again when other requests have ended."""
        return self._suspects.held

    def admit(self, request_ids: Iterable[str]) -> list[str]:
        """Return those of `request_ids` to `add` now; none while no engine runs.

        After a restart, offer all open requests again.
        """
        if not self.is_alive:
            return []
        if not self._suspects.in_flight:
            self._work_since = time.monotonic()
        return self._suspects.admit(request_ids)

    def add(self, message: AddRequest) -> None:
        """Send an admitted request to the engine."""
        self._send(message)

    def load_grammar(self, grammar: CompiledGrammar, vocabulary: Vocabulary) -> None:
        """Send a grammar to the engine, unless it has it already."""
        if (message := self._loaded_grammars.need(grammar, vocabulary)) is not None:
            self._send(message)

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests that run."""
        if request_ids:
            self._send(AbortRequests(request_ids))

    def forget(self, request_id: str) -> None:
        """Stop tracking a request that has ended."""
        self._suspects.ended(request_id)

    def reset_prefix_cache(self) -> None:
        """Ask the engine to drop its cached blocks, which it refuses while requests run."""
        self._send(ResetPrefixCache())

    # -- inside -------------------------------------------------------------------------------

    def _send(self, message: AddRequest | AbortRequests | ResetPrefixCache | LoadGrammar) -> None:
        if self.is_alive:
            assert self._process is not None
            self._process.send(message)

    async def _start_process(self) -> EngineProcess:
        self._num_processes += 1
        self._process = EngineProcess(
            self._context, self._folder, self._num_processes, logs=self._logs
        )
        self._loaded_grammars = LoadedGrammars()
        await self._process.start(self._config)
        return self._process

    async def _receive(self, process: EngineProcess) -> StepOutputs | EngineFailed:
        """Wait for the next step's outputs, or for the end of the engine."""
        while True:
            message = await process.receive()
            if message is None:
                return EngineFailed(process.exit_reason())
            if isinstance(message, EngineFailed):
                return message
            if isinstance(message, ProbeAnswer):
                if self._probes and not (probe := self._probes.pop(0)).done():
                    probe.set_result(message)
            elif isinstance(message, StepOutputs):
                if any(output.token_ids or output.pooled for output in message.outputs):
                    self._num_fruitless_starts = 0
                self._add_stats(message.stats)
                return message

    def _add_stats(self, stats: EngineStats) -> None:
        """Make `stats` the latest, with the counters of earlier engines added."""
        for name, before in self._totals.items():
            setattr(stats, name, getattr(stats, name) + before)
        if stats.steps_total > self.stats.steps_total:  # an abort reports stats without a step
            self.steps_by_tokens[stats.last_step_tokens] += 1
        self.stats = stats

    def _after_crash(self, reason: str) -> EngineCrashed:
        """Keep the counters, answer pending probes, and find the requests to fail."""
        stats = self.stats
        self._totals = {
            name: getattr(stats, name)
            for name in stats.__struct_fields__
            if name.endswith("_total")
        }
        for probe in self._probes:
            if not probe.done():
                probe.set_result(ProbeAnswer(f"{reason}: another engine is being started"))
        self._probes.clear()
        failed_ids = self._fail_suspects()
        stats.num_running = stats.num_used_blocks = stats.num_cached_blocks = 0
        return EngineCrashed(reason, failed_ids)

    def _fail_suspects(self) -> list[str]:
        """Return the requests that were the only suspect in flight when the engine crashed."""
        failed_ids = self._suspects.engine_crashed()
        for request_id in failed_ids:
            logger.error(
                "request %s crashed the engine again, as the only suspect: it is failed", request_id
            )
        return failed_ids

    async def _restart(self, reason: str) -> EngineReady:
        """Start engines until one has loaded.

        A process that is killed while it loads is replaced. An engine that reports why it cannot
        start is not: the next one would report the same.
        """
        while self._num_fruitless_starts < _MAX_FRUITLESS_STARTS:
            logger.error("%s: starting another engine; open requests will continue", reason)
            self._num_fruitless_starts += 1
            process = await self._start_process()
            try:
                return await process.ready()
            except EngineDead as error:
                reason = str(error)
                await process.end()
            except PortaLMError as error:
                raise EngineDead(f"{reason}; another could not be started: {error}") from error
        raise EngineDead(
            f"{reason}; {self._num_fruitless_starts} engines in a row crashed before their first "
            f"token"
        )

    def _overdue_s(self) -> float:
        assert self._process is not None
        work_since = self._work_since if self._suspects.in_flight else None
        return self._process.pulse.read().overdue_s(work_since=work_since)

    async def _watch(self) -> None:
        """Kill an engine that hangs in a step; `events` then starts another."""
        before: PulseReading | None = None
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if not self.is_alive or (overdue_s := self._overdue_s()) <= 0:
                before = None
                continue
            assert self._process is not None
            reading, last = self._process.pulse.read(), before
            before = reading
            if reading == last:  # read twice: not a torn read
                problem = (
                    f"step {reading.num_steps} ({reading.num_tokens} tokens) is {overdue_s:.1f} s "
                    f"past its deadline of {reading.deadline_s:.0f} s"
                )
                logger.error("%s: killing the engine", problem)
                self._process.kill(problem)
