"""The client's side of compiling grammars: a cache, and processes that are killed if they hang."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import msgspec

from portalm.config import engine_environment
from portalm.errors import CompilersBusy, InvalidRequest
from portalm.sampling_params import StructuredOutputs
from portalm.structured.messages import (
    Compile,
    Compiled,
    CompiledGrammar,
    Refused,
    Vocabulary,
    key_of,
)
from portalm.structured.schema import prepare_schema

logger = logging.getLogger(__name__)

COMPILE_S = 10.0
"""Most that compiling a grammar may take."""

_START_S = 120.0
"""Most that starting a compiler may take: it imports torch."""
_MAX_CACHE_BYTES = 64 << 20
_MAX_REFUSALS = 1024
_NUM_PROCESSES = 2
"""So that one grammar that takes long does not hold up all others."""
_MAX_WAITING = 64
"""Grammars that may wait to be compiled."""

_decode = msgspec.msgpack.Decoder(Compiled | Refused).decode


class GrammarCompiler:
    """Compiles what callers ask for, once. Nothing runs before the first grammar."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], *, compile_s: float = COMPILE_S
    ) -> None:
        """For one model.

        Args:
            vocabulary: what the model draws from, asked for once; raises `InvalidRequest` if
                no grammar can be compiled for it.
            compile_s: how long compiling one may take.
        """
        self._read_vocabulary = vocabulary
        self._compile_s = compile_s
        self._lock = threading.RLock()
        self._vocabulary: Vocabulary | None = None
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._cache_bytes = 0
        self._refusals: OrderedDict[str, str] = OrderedDict()
        """Why what was asked cannot be compiled: asked again, it costs nothing."""
        self._in_work: dict[str, Future[CompiledGrammar]] = {}
        self._executor = ThreadPoolExecutor(_NUM_PROCESSES, "grammars")
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._is_closed = False

    @property
    def vocabulary(self) -> Vocabulary:
        """What grammars are compiled for. Raises `InvalidRequest` if that is not possible."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def compile(self, asked: StructuredOutputs) -> Future[CompiledGrammar]:
        """The grammar, now or when it is compiled; others may wait for the same future.

        Raises (or the future does):
            InvalidRequest: it cannot be compiled, or not in time; the text says why.
            CompilersBusy: too many others wait.
        """
        key = key_of(asked)
        with self._lock:
            if (compiled := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                done: Future[CompiledGrammar] = Future()
                done.set_result(compiled)
                return done
            if key in self._refusals:
                raise _refused(self._refusals[key])
            if key in self._in_work:
                return self._in_work[key]
            if len(self._in_work) >= _MAX_WAITING:
                raise CompilersBusy(
                    f"{len(self._in_work)} grammars wait to be compiled: try again later"
                )
            if asked.json is not None:
                assert isinstance(asked.json, str)
                asked = dataclasses.replace(asked, json=prepare_schema(asked.json))
            future = self._in_work[key] = self._executor.submit(self._work, key, asked)
            return future

    def _work(self, key: str, asked: StructuredOutputs) -> CompiledGrammar:
        try:
            answer = self._ask(asked)
            with self._lock:
                if isinstance(answer, Refused):
                    self._refusals[key] = answer.message
                    if len(self._refusals) > _MAX_REFUSALS:
                        self._refusals.popitem(last=False)
                    raise _refused(answer.message)
                compiled = self._cache[key] = CompiledGrammar(key, answer.data)
                self._cache_bytes += len(compiled.data)
                while self._cache_bytes > _MAX_CACHE_BYTES:
                    self._cache_bytes -= len(self._cache.popitem(last=False)[1].data)
                return compiled
        finally:
            with self._lock:
                del self._in_work[key]

    def _ask(self, asked: StructuredOutputs) -> Compiled | Refused:
        vocabulary = self.vocabulary
        with self._lock:
            if self._is_closed:
                return Refused("the server ends")
            process = self._idle.pop() if self._idle else _Process(vocabulary)
            self._busy.add(process)
        answer: Compiled | Refused | None = None
        try:
            answer = process.ask(asked, self._compile_s)
        finally:
            with self._lock:
                self._busy.discard(process)
                if answer is None or self._is_closed:
                    process.kill()
                    process.close()
                if not self._is_closed:  # one that was killed is replaced now, to be ready then
                    self._idle.append(_Process(vocabulary) if answer is None else process)
        if answer is not None:
            return answer
        if process.hung:
            return Refused(
                f"compiling it takes more than {self._compile_s:g} s: lower what it repeats, "
                f"nests or leaves optional"
            )
        return Refused("compiling it takes too much memory or nests too deeply")

    def close(self) -> None:
        """End the processes; whoever still waits is refused."""
        with self._lock:
            self._is_closed = True
            idle, busy = self._idle, [*self._busy]
            self._idle = []
        for process in (*idle, *busy):
            process.kill()  # who waits for a busy one sees that it has ended
        for process in idle:
            process.close()
        self._executor.shutdown(cancel_futures=True)


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs: {reason}", param="structured_outputs")


class _Process:
    """An interpreter of its own that compiles one grammar after the other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start it."""
        self.hung = False
        """It did not answer in time."""
        self._is_ready = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection = Connection(ours.detach())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "portalm.structured.compiler_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=engine_environment(),
            )
        self._vocabulary = msgspec.msgpack.encode(vocabulary)

    def ask(self, asked: StructuredOutputs, seconds: float) -> Compiled | Refused | None:
        """Its answer; None: it ended, or did not answer in time (its start not counted)."""
        if not self._is_ready:
            self._send(self._vocabulary)
            self._is_ready = self._receive(_START_S) is not None
        self._send(msgspec.msgpack.encode(Compile(asked)))
        answer = self._receive(seconds)
        return None if answer is None else _decode(answer)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended: `_receive` says so
            self._connection.send_bytes(data)

    def _receive(self, seconds: float) -> bytes | None:
        try:
            if not self._connection.poll(seconds):
                self.hung = True
                return None
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Nobody will ask it again."""
        self._connection.close()
