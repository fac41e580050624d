"""An engine on a thread of this process: requests in from any thread, answers out per call.

Only that thread touches the engine, because a device library may keep state per thread (a current
device, a pool of OpenMP threads), and because a step must not run while a request is added.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from portalm.backend import Backend
from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.grammars import LoadedGrammars
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.engine.setup import Progress
from portalm.errors import EngineDead
from portalm.sampling_params import SamplingParams
from portalm.structured.messages import Vocabulary
from portalm.text.tokenizer import Tokenizer

T = TypeVar("T")

_CLOSE_S = 30.0
"""How long closing waits for the step that is running, in seconds."""


class Answers:
    """The answers to the requests of one call, as they arrive."""

    def __init__(self, worker: _Worker, request_ids: Sequence[str], *, is_streamed: bool) -> None:
        """Expect the answers to these requests.

        Args:
            worker: runs the requests.
            request_ids: the requests.
            is_streamed: False: `take` returns only each request's last delta, which has the whole
                output, so that the caller's thread does not run at every step.
        """
        self.is_streamed = is_streamed
        self._worker = worker
        self._open = set(request_ids)
        self._arrived: SimpleQueue[list[AnswerDelta] | BaseException] = SimpleQueue()

    @property
    def are_complete(self) -> bool:
        """True if `take` has returned the last delta of every request."""
        return not self._open

    def take(self) -> list[AnswerDelta]:
        """Wait for the next step that adds to an answer, or ends one; return the deltas in order.

        Raises:
            EngineDead: the engine was closed.
            BackendError: the device is lost.
        """
        deltas = self._arrived.get()
        if isinstance(deltas, BaseException):
            self._open.clear()
            raise deltas
        self._open.difference_update(d.request_id for d in deltas if d.final is not None)
        return deltas

    def put(self, deltas: list[AnswerDelta] | BaseException) -> None:
        """Add deltas, or the error that ended the engine; called by the engine's thread."""
        self._arrived.put(deltas)

    def close(self) -> None:
        """Abort the requests that have not ended."""
        if self._open:
            self._worker.drop(sorted(self._open))
            self._open.clear()


class InProcessEngine:
    """An engine and the thread that runs it. All methods may be called from any thread.

    The thread ends with `close`, when this object is collected, and at exit.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        backend: Backend | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load the model on a new thread, and wait for it.

        Args:
            config: the model to run and the settings to run it with.
            backend: a started backend; None: start the one that `config.device` names.
            progress: called on the new thread as the engine loads.

        Raises:
            PortaLMError: the model, the device or the settings do not work; the text says why.
        """
        self._worker = _Worker()
        # the thread refers to the worker only, so that dropping the last reference to this ends it
        self._finalizer = weakref.finalize(self, self._worker.close)
        self._worker.start(lambda: Engine(config, backend=backend, progress=progress))
        self.engine = self._worker.loaded.result()
        """The engine: its methods may be called only while nothing runs; its attributes that do
        not change (`ready`, `config`, `tasks`) may be read at any time."""

    def use_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Detokenize answers with `tokenizer`; call this before the first request.

        Args:
            tokenizer: None: answers have no text.
        """
        self._worker.outputs = OutputProcessor(tokenizer)

    def submit(
        self,
        processed: Sequence[ProcessedInput],
        params: Sequence[SamplingParams],
        vocabulary: Callable[[], Vocabulary],
        *,
        is_streamed: bool,
    ) -> Answers:
        """Add requests, all of them or none.

        Args:
            processed: the checked requests.
            params: their sampling parameters, one each.
            vocabulary: returns the vocabulary that their grammars were compiled for.
            is_streamed: as in `Answers`.

        Raises:
            InvalidRequest: a request can never be answered.
            EngineDead: the engine is closed, or belongs to the parent of this forked process.
        """
        arrival_time = time.time()
        ids = [one.request_id for one in processed]
        answers = Answers(self._worker, ids, is_streamed=is_streamed)
        try:
            self.call(
                lambda _: self._worker.add(answers, processed, params, vocabulary, arrival_time)
            )
        except BaseException:  # Ctrl-C, too: then the requests may have been added
            answers.close()
            raise
        return answers

    def call(self, work: Callable[[Engine], T]) -> T:
        """Return `work(engine)`, called on the engine's thread between two steps.

        Raises:
            EngineDead: the engine is closed, or belongs to the parent of this forked process.
        """
        return self._worker.call(work)

    def close(self) -> None:
        """End the engine and its thread; requests that have not ended raise `EngineDead`."""
        self._finalizer()


class _Worker:
    """What the engine's thread runs, and the queue to it."""

    def __init__(self) -> None:
        self.loaded: Future[Engine] = Future()
        self.outputs = OutputProcessor(None)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.RLock()
        """Held to add a command or to end, so that every command is run or fails. A garbage
        collection may close a stream, which adds a command, while its thread holds this."""
        self._ended: BaseException | None = None
        """Why no command can be run any more."""
        self._is_closing = False
        self._answers: dict[str, Answers] = {}
        """By request id: where its answers go."""
        self._grammars = LoadedGrammars()
        self._process_id = os.getpid()
        self._thread: threading.Thread | None = None

    # -- from any thread ----------------------------------------------------------------------

    def start(self, load: Callable[[], Engine]) -> None:
        """Start the thread, which first calls `load`."""
        self._thread = threading.Thread(
            target=self._run, args=(load,), name="portalm-engine", daemon=True
        )
        self._thread.start()

    def call(self, work: Callable[[Engine], T]) -> T:
        """Run `work` on the engine's thread and return its result or raise its error."""
        result: Future[T] = Future()

        def command() -> None:
            try:
                self._require_running()
                result.set_result(work(self.loaded.result()))
            except BaseException as error:
                result.set_exception(error)

        self._post(command)
        return result.result()

    def _post(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._process_id:
            raise EngineDead(
                f"this LLM belongs to process {self._process_id}, and a fork does not copy its "
                f"engine: create a new LLM in process {os.getpid()}"
            )
        with self._lock:
            self._require_running()
            self._commands.put(command)

    def _require_running(self) -> None:
        if self._ended is not None:
            raise EngineDead(f"{self._ended}: create a new LLM") from self._ended

    def drop(self, request_ids: Sequence[str]) -> None:
        """Abort requests, without waiting for it; does nothing after the engine has ended."""
        if os.getpid() != self._process_id:
            return
        with self._lock:
            if self._ended is None:
                self._commands.put(lambda: self._drop(request_ids))

    def close(self) -> None:
        """End the thread and wait for it."""
        thread = self._thread
        if thread is None or os.getpid() != self._process_id:
            return

        def end() -> None:
            self._is_closing = True

        with self._lock:
            if self._ended is None:
                self._commands.put(end)
        # a garbage collection may call this on the engine's thread; loading cannot be cut short
        if thread is not threading.current_thread() and self.loaded.done():
            thread.join(_CLOSE_S)

    # -- on the engine's thread ---------------------------------------------------------------

    def _run(self, load: Callable[[], Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:
            self._end(error)
            self.loaded.set_exception(error)
            return
        del load  # it refers to the caller's progress bar
        self.loaded.set_result(engine)
        try:
            self._serve(engine)
            engine.close()
            self._end(EngineDead("this LLM was closed"))
        except BaseException as error:
            self._end(error)

    def _serve(self, engine: Engine) -> None:
        """Run commands and steps until the worker is closed.

        Raises:
            BackendError: the device is lost.
        """
        while True:
            while not self._commands.empty() or not engine.has_work():
                self._commands.get()()
                if self._is_closing:
                    return
            processed = self.outputs.process(engine.step().outputs)
            if processed.abort_ids:
                engine.abort(processed.abort_ids)
            self._deliver(processed.deltas)

    def _deliver(self, deltas: Sequence[AnswerDelta]) -> None:
        """Hand each call what this step adds to its answers."""
        by_call: dict[Answers, list[AnswerDelta]] = {}
        for delta in deltas:
            answers = self._answers[delta.request_id]
            if answers.is_streamed or delta.final is not None:
                by_call.setdefault(answers, []).append(delta)
            if delta.final is not None:
                del self._answers[delta.request_id]
                self.outputs.forget(delta.request_id)
        for answers, added in by_call.items():
            answers.put(added)

    def add(
        self,
        answers: Answers,
        processed: Sequence[ProcessedInput],
        params: Sequence[SamplingParams],
        vocabulary: Callable[[], Vocabulary],
        arrival_time: float,
    ) -> None:
        """Add requests, all of them or none."""
        engine = self.loaded.result()
        added: list[str] = []
        try:
            for one, its_params in zip(processed, params, strict=True):
                self.outputs.add(one, its_params, arrival_time=arrival_time)
                added.append(one.request_id)
                self._answers[one.request_id] = answers
                if one.grammar is not None:
                    load = self._grammars.need(one.grammar, vocabulary())
                    if load is not None:
                        engine.load_grammar(load)
                for message in one.requests:
                    engine.add(message)
        except BaseException:
            self._drop(added)
            raise

    def _drop(self, request_ids: Sequence[str]) -> None:
        if self._ended is not None:
            return
        for request_id in request_ids:
            self.loaded.result().abort(self.outputs.engine_ids(request_id))
            self.outputs.forget(request_id)
            self._answers.pop(request_id, None)

    def _end(self, error: BaseException) -> None:
        """Fail the calls that wait with `error`, and all later ones with `EngineDead`."""
        with self._lock:
            self._ended = error
        while not self._commands.empty():  # these fail now: nothing is added any more
            self._commands.get()()
        for answers in set(self._answers.values()):
            answers.put(error)
        self._answers.clear()
