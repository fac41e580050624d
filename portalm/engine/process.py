"""One engine process: started, spoken to, ended. Its requests are its client's concern."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from pathlib import Path

import msgspec
import zmq

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
from portalm.errors import EngineDead, PortaLMError
from portalm.logs import LogConfig

_TERMINATE_S = 5.0
"""Seconds between asking an engine process to end and killing it."""

_LAST_WORDS_S = 0.2
"""What an engine process said at its end may be on its way this long."""

_MAX_AT_ONCE = 64
"""Messages that are read before others of the event loop have their turn."""


class EngineProcess:
    """An interpreter of its own that runs one engine. All methods belong to one event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
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
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # however many requests wait, none is lost
        self._socket.bind(self._address)
        (folder / f"engine-{number}").chmod(0o600)
        self._process: asyncio.subprocess.Process | None = None
        self._messages: deque[FromEngine] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False
        """The process has ended, and all it said was read."""
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
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._take)
        self._take()
        ended = asyncio.ensure_future(self._process.wait())
        ended.add_done_callback(lambda _: self._loop.call_later(_LAST_WORDS_S, self._end_reading))

    async def ready(self) -> EngineReady:
        """Wait until the model is loaded.

        Raises:
            EngineDead: the process ended without a word.
            PortaLMError: it could not start; the text is the engine's own.
        """
        while isinstance(message := await self.receive(), EngineProgress):
            self.progress = message
        if message is None:
            assert self._process is not None
            raise EngineDead(
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
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # to send may take note of a message that came: its file descriptor tells nothing of it then
        self._loop.call_soon(self._take)

    async def receive(self) -> FromEngine | None:
        """The next message; None once the process has ended and all it said was received."""
        while not self._messages:
            if self._is_over:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._messages.popleft()

    def _take(self) -> None:
        """Read what is there."""
        if self._socket.closed:
            return
        for _ in range(_MAX_AT_ONCE):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._messages.append(self._decoder.decode(data))
        else:
            self._loop.call_soon(self._take)
        if self._messages:
            self._wake()

    def _end_reading(self) -> None:
        self._take()
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Ask the process to end, then terminate it, then kill it; close the socket.

        One that has been ended stays so.
        """
        if self._socket.closed:
            return
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
        if process is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
