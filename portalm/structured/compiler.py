"""Compile grammars for a client, with a cache and processes that are killed if they hang."""

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
"""Time limit for compiling a grammar."""

_START_S = 120.0
"""Time limit for starting a compiler process, which imports torch."""
_MAX_CACHE_BYTES = 64 << 20
_MAX_REFUSALS = 1024
_NUM_PROCESSES = 2
"""More than one, so that one slow grammar does not delay all others."""
_MAX_WAITING = 64
"""Maximum number of grammars being compiled or waiting for it."""

_decode = msgspec.msgpack.Decoder(Compiled | Refused).decode


class GrammarCompiler:
    """Compiles each grammar once, in processes that are started for the first grammar."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], *, compile_s: float = COMPILE_S
    ) -> None:
        """Create a compiler for one model.

        Args:
            vocabulary: returns the model's vocabulary, called until it succeeds once; raises
                `InvalidRequest` if no grammar can be compiled for the model.
            compile_s: time limit for compiling one grammar, in seconds.
        """
        self._read_vocabulary = vocabulary
        self._compile_s = compile_s
        self._lock = threading.RLock()
        self._vocabulary: Vocabulary | None = None
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._cache_bytes = 0
        self._refusals: OrderedDict[str, str] = OrderedDict()
        """Cached errors, by key, of grammars that cannot be compiled."""
        self._compiling: dict[str, Future[CompiledGrammar]] = {}
        self._executor = ThreadPoolExecutor(_NUM_PROCESSES, "grammars")
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._is_closed = False

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that grammars are compiled for.

        Raises:
            InvalidRequest: no grammar can be compiled for the model.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def compile(self, asked: StructuredOutputs) -> Future[CompiledGrammar]:
        """Compile a grammar, or return it from the cache; callers may share the same future.

        Raises (here or from the future):
            InvalidRequest: it cannot be compiled, or not in time; the message says why.
            CompilersBusy: too many grammars are waiting to be compiled.
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
            if key in self._compiling:
                return self._compiling[key]
            if len(self._compiling) >= _MAX_WAITING:
                raise CompilersBusy(
                    f"{len(self._compiling)} grammars are waiting to be compiled; try again later"
                )
            if asked.json is not None:
                assert isinstance(asked.json, str)
                asked = dataclasses.replace(asked, json=prepare_schema(asked.json))
            future = self._compiling[key] = self._executor.submit(self._compile, key, asked)
            return future

    def _compile(self, key: str, asked: StructuredOutputs) -> CompiledGrammar:
        try:
            answer = self._run_process(asked)
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
                del self._compiling[key]

    def _run_process(self, asked: StructuredOutputs) -> Compiled | Refused:
        """Compile in an idle or new process; kill and replace it if it fails."""
        vocabulary = self.vocabulary
        with self._lock:
            if self._is_closed:
                return Refused("the server is shutting down")
            process = self._idle.pop() if self._idle else _Process(vocabulary)
            self._busy.add(process)
        answer: Compiled | Refused | None = None
        try:
            answer = process.compile(asked, self._compile_s)
        finally:
            with self._lock:
                self._busy.discard(process)
                if answer is None or self._is_closed:
                    process.kill()
                    process.close()
                if not self._is_closed:  # replace a killed process now, so that it is ready later
                    self._idle.append(_Process(vocabulary) if answer is None else process)
        if answer is not None:
            return answer
        if process.hung:
            return Refused(
                f"compiling takes more than {self._compile_s:g} s; use fewer repetitions, optional "
                f"parts or levels of nesting"
            )
        return Refused(
            "compiling takes too much memory, or the nesting is too deep; use fewer repetitions, "
            "optional parts or levels of nesting"
        )

    def close(self) -> None:
        """Kill the processes; grammars that are still waiting fail."""
        with self._lock:
            self._is_closed = True
            idle, busy = self._idle, [*self._busy]
            self._idle = []
        for process in (*idle, *busy):
            process.kill()  # the thread that waits for a busy process sees that it has ended
        for process in idle:
            process.close()
        self._executor.shutdown(cancel_futures=True)


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs: {reason}", param="structured_outputs")


class _Process:
    """A compiler process, which compiles one grammar at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start the process."""
        self.hung = False
        """Whether it did not answer in time."""
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

    def compile(self, asked: StructuredOutputs, seconds: float) -> Compiled | Refused | None:
        """Compile a grammar in the process.

        Args:
            asked: the grammar.
            seconds: time limit, not including the process's startup.

        Returns:
            The result; None if the process ended or did not answer in time.
        """
        if not self._is_ready:
            self._send(self._vocabulary)
            self._is_ready = self._receive(_START_S) is not None
        self._send(msgspec.msgpack.encode(Compile(asked)))
        answer = self._receive(seconds)
        return None if answer is None else _decode(answer)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `_receive` reports
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
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the connection to the process."""
        self._connection.close()
