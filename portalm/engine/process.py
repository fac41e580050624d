"""One engine process: started, spoken to, ended. Its requests are its client's concern."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from portalm.config import EngineConfig, engine_environment
from portalm.engine.messages import (
    EngineFailed,
    EngineProgress,
    EngineReady,
    FromEngine,
    Shutdown,
    ToEngine,
)
from portalm.engine.pulse import Pulse
from portalm.errors import PortaLMError
from portalm.logs import LogConfig

_TERMINATE_S = 5.0
"""Seconds between asking an engine process to end and killing it."""


class EngineProcess:
    """An interpreter of its own that runs one engine. All methods belong to one event loop."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        folder: Path,
        number: int,
        *,
        logs: LogConfig,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            context: of the client's sockets.
            folder: private to the user; the socket lies in it.
            number: which engine of the client this is.
            logs: how it writes its log.
        """
        self._logs = logs
        self._address = f"ipc://{folder}/engine-{number}"
        self._pulse_path = folder / f"pulse-{number}"
        self.pulse = Pulse(self._pulse_path)
        self.progress: EngineProgress | None = None
        """How far it is; None: it has not said anything yet."""
        self._socket: zmq.asyncio.Socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # however many requests wait, none is lost
        self._sender: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket)
        self._socket.bind(self._address)
        (folder / f"engine-{number}").chmod(0o600)
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Future[int] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    async def start(self, config: EngineConfig) -> None:
        """Start the process; it loads its model from now on."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "portalm.engine.core_process",
            self._address,
            str(self._pulse_path),
            msgspec.json.encode(self._logs).decode(),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=engine_environment(),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config))
        self._process.stdin.close()
        self._ended = asyncio.ensure_future(self._process.wait())

    async def ready(self) -> EngineReady:
        """Wait until the model is loaded.

        Raises:
            PortaLMError: it could not start; the text is the engine's own.
        """
        while isinstance(message := await self.receive(), EngineProgress):
            self.progress = message
        if message is None:
            assert self._process is not None
            raise PortaLMError(
                f"the engine process ended with status {self._process.returncode} before its "
                f"model was loaded; its messages are above"
            )
        if not isinstance(message, EngineReady):
            text = message.message if isinstance(message, EngineFailed) else "no word of readiness"
            raise PortaLMError(text)
        return message

    @property
    def is_running(self) -> bool:
        """The process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    def send(self, message: ToEngine) -> None:
        """Put a message on its way; one to a process that has ended is lost."""
        with contextlib.suppress(zmq.Again):
            self._sender.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def receive(self) -> FromEngine | None:
        """The next message; None once the process has ended and all it said was received."""
        assert self._ended is not None
        received = asyncio.ensure_future(self._socket.recv())
        try:
            either: set[asyncio.Future[Any]] = {received, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():  # its last words may be on their way
                await asyncio.wait({received}, timeout=0.2)
        finally:
            if not received.done():
                received.cancel()
        if not received.done() or received.cancelled():
            return None
        message: FromEngine = self._decoder.decode(received.result())
        return message

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Ask the process to end, then terminate it, then kill it; close the socket."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(zmq.ZMQError):
                self.send(Shutdown())
            for end in (process.terminate, process.kill):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), _TERMINATE_S)
                    break
                with contextlib.suppress(ProcessLookupError):
                    end()
            await process.wait()
        self._socket.close()
