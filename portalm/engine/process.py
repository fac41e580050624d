"""One engine process: start it, exchange messages with it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import zmq

from portalm.config import EngineConfig, engine_environment
from portalm.engine.crash_reason import describe_exit, oom_kills
from portalm.engine.messages import (
    EngineFailed,
    EngineProgress,
    EngineReady,
    FromEngine,
    Shutdown,
    ToEngine,
)
from portalm.engine.pulse import Pulse
from portalm.engine.stderr_relay import StderrRelay
from portalm.errors import EngineDead, PortaLMError
from portalm.logs import LogConfig

_TERMINATE_S = 5.0
"""Seconds to wait after the Shutdown message, and after SIGTERM, before the next signal."""

_LAST_MESSAGES_S = 0.2
"""Seconds after the exit of a process in which its last messages may still arrive."""

_MAX_PER_TURN = 64
"""Messages to read before other tasks of the event loop run."""


def _copy_of_stderr() -> int:
    """File descriptor of this process's stderr, for the engine's last lines if this one dies."""
    try:
        return os.dup(2)
    except OSError:  # it was closed, as daemons do
        return os.open(os.devnull, os.O_WRONLY)


class EngineProcess:
    """A Python process that runs one engine. All methods belong to one event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: Path,
        number: int,
        *,
        logs: LogConfig,
    ) -> None:
        """Bind the socket. Nothing runs before `start`.

        Args:
            context: ZeroMQ context of the client.
            folder: folder for the socket and the pulse file; private to the user.
            number: number of the process, for the file names.
            logs: log format and level of the process.
        """
        self._logs = logs
        self._address = f"ipc://{folder}/engine-{number}"
        self._pulse_path = folder / f"pulse-{number}"
        self.pulse = Pulse(self._pulse_path)
        self.progress: EngineProgress | None = None
        """Latest loading progress; None: none reported yet."""
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # no limit: no request may be dropped
        self._socket.bind(self._address)
        (folder / f"engine-{number}").chmod(0o600)
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: StderrRelay | None = None
        self._kill_reason = ""
        """Why this process killed the other; empty: it did not."""
        self._oom_kills_before = 0
        self._messages: deque[FromEngine] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False
        """The process has exited, and all its messages have been read."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    async def start(self, config: EngineConfig) -> None:
        """Start the process, which then loads its model. Its stderr is passed on to this one's."""
        self._oom_kills_before = oom_kills()
        self._stderr = StderrRelay()
        own_stderr = _copy_of_stderr()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "portalm.engine.core_process",
                self._address,
                str(self._pulse_path),
                msgspec.json.encode(self._logs).decode(),
                str(own_stderr),
                stdin=asyncio.subprocess.PIPE,
                stderr=self._stderr.child_fd,
                pass_fds=(own_stderr,),
                start_new_session=True,
                env=engine_environment(),
            )
        finally:
            os.close(own_stderr)
        self._stderr.start()
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config))
        self._process.stdin.close()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._read()
        ended = asyncio.ensure_future(self._process.wait())
        ended.add_done_callback(
            lambda _: self._loop.call_later(_LAST_MESSAGES_S, self._end_reading)
        )

    async def ready(self) -> EngineReady:
        """Wait until the model is loaded.

        Raises:
            EngineDead: the process exited without a message.
            PortaLMError: it could not start; the text is the engine's own.
        """
        while isinstance(message := await self.receive(), EngineProgress):
            self.progress = message
        if message is None:
            raise EngineDead(f"{self.exit_reason()}, before its model was loaded")
        if not isinstance(message, EngineReady):
            text = (
                message.message
                if isinstance(message, EngineFailed)
                else "the engine did not report that it is ready"
            )
            raise PortaLMError(text)
        return message

    @property
    def is_running(self) -> bool:
        """The process was started and has not exited."""
        return self._process is not None and self._process.returncode is None

    def exit_reason(self) -> str:
        """Describe why the process, which has exited, did so."""
        assert self._process is not None
        assert self._stderr is not None
        status = self._process.returncode
        assert status is not None
        if self._kill_reason and status == -signal.SIGKILL:
            return f"the engine process was killed: {self._kill_reason}"
        num_oom_kills = oom_kills() - self._oom_kills_before
        end = describe_exit(
            status, self._stderr.lines(), now=time.monotonic(), num_oom_kills=num_oom_kills
        )
        return f"the engine process {end}"

    def send(self, message: ToEngine) -> None:
        """Send a message without waiting; it is lost if the process has exited."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # sending may clear the event of a received message: the fd does not become readable then
        self._loop.call_soon(self._read)

    async def receive(self) -> FromEngine | None:
        """Wait for the next message; None once the process has exited and all were received."""
        while not self._messages:
            if self._is_over:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._messages.popleft()

    def _read(self) -> None:
        """Read the messages that have arrived."""
        if self._socket.closed:
            return
        for _ in range(_MAX_PER_TURN):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._messages.append(self._decoder.decode(data))
        else:
            self._loop.call_soon(self._read)
        if self._messages:
            self._wake()

    def _end_reading(self) -> None:
        self._read()
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def kill(self, reason: str) -> None:
        """Kill the process; `exit_reason` then includes `reason`."""
        if self._process is not None and self._process.returncode is None:
            self._kill_reason = reason
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Stop the process (by message, then SIGTERM, then SIGKILL) and close the socket.

        Does nothing the second time.
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
        if self._stderr is not None:
            self._stderr.close()
        self._socket.close()
