"""The engine in its own process.

`python -m portalm.engine.core_process ADDRESS PULSE LOGS < CONFIG`

A fresh interpreter rather than a fork or multiprocessing: nothing of the server's threads, sockets
or signal handlers comes along, and what crosses is msgpack on a private socket, never a pickle.
"""

from __future__ import annotations

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
"""How often an idle engine looks whether its parent is still there."""

_decoder = msgspec.msgpack.Decoder(ToEngine)
_encoder = msgspec.msgpack.Encoder()


def run_core(config: EngineConfig, address: str, pulse: Pulse) -> int:
    """Serve one client at a ZeroMQ address until it says Shutdown or is gone; the exit status.

    What the engine is doing is always to be seen in `pulse`.
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
        return _serve(config, socket, send, parent, pulse)
    except PortaLMError as error:
        send(EngineFailed(str(error)))
        return 2
    except Exception as error:
        logger.exception("the engine ended")
        send(EngineFailed(f"the engine ended unexpectedly: {type(error).__name__}: {error}"))
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
) -> int:
    # what is imported and loaded stays: to look for garbage in it is a tenth of the start, and a
    # pause later
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
                return 0
            if isinstance(message, Probe):
                send(_probe(engine, message))
            else:
                outputs += _handle(engine, message)
            timeout_ms = 0
        if outputs:
            send(StepOutputs(outputs, engine.stats()))
        if engine.has_work():
            news = engine.step()
            pulse.end()
            send(news)
        elif not engine.capture_next() and os.getppid() != parent:
            logger.warning("the server is gone: the engine ends")
            return 0


def _probe(engine: Engine, message: Probe) -> ProbeAnswer:
    try:
        engine.backend.probe(message.timeout_s)
    except BackendError as error:
        return ProbeAnswer(str(error))
    return ProbeAnswer()


def _handle(
    engine: Engine, message: AddRequest | LoadGrammar | AbortRequests | ResetPrefixCache
) -> list[TokenOutput]:
    """Outputs that the message causes at once."""
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
    """Read the config from stdin and serve."""
    write_logs("engine", msgspec.json.decode(sys.argv[3], type=LogConfig))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    return run_core(config, sys.argv[1], Pulse(Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(main())
