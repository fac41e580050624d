"""The engine in its own process.

`python -m portalm.engine.core_process ADDRESS PULSE LOGS < CONFIG`

It is a fresh interpreter rather than a fork or multiprocessing, so it inherits none of the server's
threads, sockets or signal handlers. Messages are msgpack on a private socket, never pickle.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from portalm.config import EngineConfig
from portalm.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineProgress,
    FromEngine,
    LoadGrammar,
    Probe,
    ProbeAnswer,
    ResetPrefixCache,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenOutput,
)
from portalm.engine.pulse import Pulse
from portalm.errors import BackendError, InvalidRequest, PortaLMError
from portalm.logs import LogConfig, write_logs

if TYPE_CHECKING:
    from portalm.engine.engine import Engine

logger = logging.getLogger(__name__)

_IDLE_POLL_MS = 1000
"""How often an idle engine checks that its parent process is alive."""

_decoder = msgspec.msgpack.Decoder(ToEngine)
_encoder = msgspec.msgpack.Encoder()


def run_core(config: EngineConfig, address: str, pulse: Pulse, *, parents_stderr: int) -> int:
    """Serve the client at a ZeroMQ address until it sends Shutdown or exits.

    Args:
        config: the engine's settings.
        address: where the client listens.
        pulse: always shows what the engine is doing.
        parents_stderr: file descriptor of the parent's stderr: without the parent, nothing reads
            this process's own.

    Returns:
        The exit status.
    """
    parent = os.getppid()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)

    def send(message: FromEngine) -> None:
        socket.send(_encoder.encode(message))

    try:
        if not _serve(config, socket, send, parent, pulse):
            os.dup2(parents_stderr, sys.stderr.fileno())
            logger.warning("the parent process has exited: shutting down the engine")
        return 0
    except PortaLMError as error:
        send(EngineFailed(str(error)))
        return 2
    except Exception as error:
        logger.exception("the engine crashed")
        send(EngineFailed(f"the engine crashed: {type(error).__name__}: {error}"))
        return 1
    finally:
        socket.close()
        context.term()


def _serve(
    config: EngineConfig,
    socket: zmq.Socket[bytes],
    send: Callable[[FromEngine], None],
    parent: int,
    pulse: Pulse,
) -> bool:
    """Serve the client; return True after its Shutdown, False if the parent has exited."""
    # imported modules and the loaded model are never garbage: collecting during startup would take
    # a tenth of its time, and freezing them keeps later collections short
    gc.disable()
    from portalm.engine.engine import Engine

    engine = Engine(config, progress=lambda phase, share: send(EngineProgress(phase, share)))
    gc.freeze()
    gc.enable()
    engine.step_begins = pulse.begin
    send(engine.ready)
    while True:
        outputs: list[TokenOutput] = []
        timeout_ms = 0 if engine.has_work() or engine.has_captures_left else _IDLE_POLL_MS
        while socket.poll(timeout_ms):
            message = _decoder.decode(socket.recv())
            if isinstance(message, Shutdown):
                engine.close()
                gc.unfreeze()
                return True
            if isinstance(message, Probe):
                send(_probe(engine, message))
            else:
                outputs += _handle(engine, message)
            timeout_ms = 0
        if outputs:
            send(StepOutputs(outputs, engine.stats()))
        if engine.has_work():
            step_outputs = engine.step()
            pulse.end()
            send(step_outputs)
        elif not engine.capture_next() and os.getppid() != parent:
            return False


def _probe(engine: Engine, message: Probe) -> ProbeAnswer:
    try:
        engine.backend.probe(message.timeout_s)
    except BackendError as error:
        return ProbeAnswer(str(error))
    return ProbeAnswer()


def _handle(
    engine: Engine, message: AddRequest | LoadGrammar | AbortRequests | ResetPrefixCache
) -> list[TokenOutput]:
    """Apply a message; return the outputs that it causes at once."""
    if isinstance(message, AddRequest):
        try:
            engine.add(message)
        except InvalidRequest as error:
            return [
                TokenOutput(
                    request_id=message.request_id,
                    token_ids=[],
                    finish_reason="error",
                    error=str(error),
                    is_refused=True,
                )
            ]
        return []
    if isinstance(message, LoadGrammar):
        engine.load_grammar(message)
        return []
    if isinstance(message, AbortRequests):
        return engine.abort(message.request_ids)
    engine.reset_prefix_cache()
    return []


def main() -> int:
    """Read the config from stdin and run the engine."""
    write_logs("engine", msgspec.json.decode(sys.argv[3], type=LogConfig))
    faulthandler.enable()  # a crash in native code writes the Python stack to the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    pulse = Pulse(Path(sys.argv[2]))
    return run_core(config, sys.argv[1], pulse, parents_stderr=int(sys.argv[4]))


if __name__ == "__main__":
    sys.exit(main())
