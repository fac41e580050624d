"""The engine in a process of its own: messages in, one message out a step.

A plain child process (`python -m portalm.engine.core_process`), not `multiprocessing`: nothing of
the caller's main module is run again, nothing is pickled, and its stdin tells it when the parent is
gone. Its settings come as one line of JSON on stdin, everything else as msgpack over a ZeroMQ pair.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import msgspec
import zmq

from portalm.config import EngineConfig
from portalm.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    FromEngine,
    ResetPrefixCache,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenOutput,
)
from portalm.errors import BackendError, InvalidRequest, PortaLMError

if TYPE_CHECKING:
    from portalm.engine.engine import Engine

logger = logging.getLogger(__name__)

MAX_BROKEN_STEPS = 3
"""Steps in a row that may fail for reasons of the engine's own before it gives up."""

_LINGER_MS = 2000
"""How long a message that is on its way holds up the end of the process."""

_PR_SET_PDEATHSIG = 1


class Core:
    """Feeds an engine from a socket and sends what comes of each step."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._live: set[str] = set()
        """Requests that the client still expects news of."""
        self._replies: list[TokenOutput] = []
        """Answers to messages, sent with the next step's."""
        self._num_broken_steps = 0

    def run(self) -> None:
        """Take messages and step, until told to shut down; asleep while there is nothing to do.

        Raises:
            BackendError: the device is lost.
            RuntimeError: step after step failed for reasons of the engine's own.
        """
        while self._take_messages():
            if self._engine.has_work():
                self._send(self._step())
            elif self._replies:
                self._send(self._no_step())
        self._abort(list(self._live))
        self._send(self._no_step())

    def _take_messages(self) -> bool:
        """Handle all that has arrived, waiting for it while idle; False: shut down."""
        if not self._engine.has_work() and not self._handle(self._socket.recv()):
            return False
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if not self._handle(data):
                return False

    def _handle(self, data: bytes) -> bool:
        match self._decode(data):
            case AddRequest() as message:
                self._add(message)
            case AbortRequests(request_ids):
                self._abort(request_ids)
            case ResetPrefixCache():
                self._engine.reset_prefix_cache()
            case Shutdown():
                return False
        return True

    def _add(self, message: AddRequest) -> None:
        try:
            self._engine.add(message)
        except InvalidRequest as error:
            self._refuse(message.request_id, str(error), is_refused=True)
        except Exception as error:  # a fault of ours: this request pays, the others go on
            logger.exception("request %s could not be added", message.request_id)
            self._refuse(message.request_id, _internal(error))
        else:
            self._live.add(message.request_id)

    def _refuse(self, request_id: str, why: str, *, is_refused: bool = False) -> None:
        self._replies.append(
            TokenOutput(
                request_id=request_id,
                token_ids=[],
                finish_reason="error",
                error=why,
                is_refused=is_refused,
            )
        )

    def _abort(self, request_ids: list[str]) -> None:
        self._live.difference_update(request_ids)
        self._replies += self._engine.abort(request_ids)

    def _step(self) -> StepOutputs:
        try:
            outputs = self._engine.step()
        except BackendError as error:
            if error.kind == "device_lost":
                raise
            return self._fail_all(error)
        except Exception as error:
            return self._fail_all(error)
        self._num_broken_steps = 0
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._live.discard(output.request_id)
        return outputs

    def _fail_all(self, error: Exception) -> StepOutputs:
        """A step broke in a way that the engine does not know: every live request ends with it."""
        logger.error("a step failed, %d requests end", len(self._live), exc_info=error)
        self._num_broken_steps += 1
        if self._num_broken_steps > MAX_BROKEN_STEPS:
            raise RuntimeError(
                f"{self._num_broken_steps} steps in a row failed, the last with: {error}"
            ) from error
        failed, why = list(self._live), _internal(error)
        self._live.clear()
        self._engine.abort(failed)  # their "abort" outputs are not sent: they end in an error
        return StepOutputs(
            outputs=[
                TokenOutput(request_id=name, token_ids=[], finish_reason="error", error=why)
                for name in failed
            ],
            stats=self._engine.stats(),
        )

    def _no_step(self) -> StepOutputs:
        return StepOutputs(outputs=[], stats=self._engine.stats())

    def _send(self, step: StepOutputs) -> None:
        if self._replies:
            step.outputs = [*self._replies, *step.outputs]
            self._replies = []
        self._socket.send(self._encode(step))


def run_core(config: EngineConfig, address: str) -> int:
    """Load the model, serve it on the socket at `address`, and return the exit status.

    The first message is `EngineReady`, or `EngineFailed` with a text for the user.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # neither side waits for the other; what is queued is bounded by requests
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.connect(address)
    try:
        _serve(config, socket)
    except PortaLMError as error:
        _tell(socket, EngineFailed(str(error)))
        return 1
    except Exception as error:
        logger.exception("the engine failed")
        _tell(socket, EngineFailed(f"the engine failed: {_internal(error)}"))
        return 1
    finally:
        socket.close()
        context.term()
    return 0


def _serve(config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
    from portalm.engine.engine import Engine  # imports torch; EngineFailed must be able to say so

    with _LoadingBar() as bar:
        engine = Engine(config, progress=bar.show)
    gc.collect()
    gc.freeze()  # what loading left is not looked at again in every collection
    try:
        _tell(socket, engine.ready)
        Core(engine, socket).run()
    finally:
        engine.close()


class _LoadingBar:
    """How far loading is, on a terminal; nothing elsewhere."""

    def __enter__(self) -> _LoadingBar:
        from tqdm import tqdm

        self._bar = tqdm(total=100, desc="Loading model", unit="%", disable=None, leave=False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def show(self, phase: str, share: float) -> None:
        self._bar.update(int(share * 100) - self._bar.n)


def _tell(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))


def _internal(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (the server's log has the traceback)"


def _end_with_parent() -> None:
    """Make sure that this process does not outlive its parent, idle, stepping or loading."""

    def watch() -> None:
        while os.read(0, 4096):  # the parent holds the other end and never writes again
            pass
        os._exit(1)

    threading.Thread(target=watch, name="portalm-parent-watch", daemon=True).start()
    if sys.platform == "linux":  # also where a wedged native call lets no thread run
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _read_line() -> bytes:
    """One line from stdin, unbuffered: what follows it is the watch's."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            raise EOFError("the parent ended before it sent the engine's settings")
        line += part
    return line


def main() -> int:
    """Entry of the child process: `python -m portalm.engine.core_process ADDRESS`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group: the parent acts
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    config = msgspec.json.decode(_read_line(), type=EngineConfig)
    _end_with_parent()
    return run_core(config, sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
