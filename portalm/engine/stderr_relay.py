"""Pass on the stderr of a child process, and keep its last lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections import deque

from portalm.engine.crash_reason import LogLine

_MAX_LINES = 500
"""Lines to keep: more than faulthandler's report of all threads of an engine."""

_MAX_LINE = 4096
"""Bytes of a line to keep."""

_READ_BYTES = 65536
"""Capacity of a pipe on Linux."""

_LINE_END = re.compile(rb"[\r\n]")
"""Progress bars end their lines with a carriage return."""


class StderrRelay:
    """A pipe for a child's stderr, read by the event loop and written to this process's stderr."""

    def __init__(self) -> None:
        """Create the pipe. Nothing is read before `start`."""
        self._fd, self.child_fd = os.pipe()
        os.set_blocking(self._fd, False)
        self._lines: deque[LogLine] = deque(maxlen=_MAX_LINES)
        self._rest = b""
        """The last line, until its end arrives."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Close this process's copy of the child's end, and read whenever there is something."""
        self._close_child_end()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def lines(self) -> list[LogLine]:
        """Read what has arrived; return the last lines, oldest first."""
        while self._read():
            pass
        rest = [self._line(self._rest)] if self._rest else []
        return [*self._lines, *rest]

    def close(self) -> None:
        """Read what has arrived and close the pipe; does nothing the second time."""
        if self._fd >= 0:
            while self._read():
                pass
            self._stop_reading()
            self._close_child_end()
            os.close(self._fd)
            self._fd = -1

    def _close_child_end(self) -> None:
        if self.child_fd >= 0:
            os.close(self.child_fd)
            self.child_fd = -1

    def _stop_reading(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None

    def _read(self) -> bool:
        """Read and pass on once; return True if there was something."""
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:  # all processes that could write have ended
            self._stop_reading()
            return False
        _write_stderr(data)
        *ended, self._rest = _LINE_END.split(self._rest + data)
        self._rest = self._rest[:_MAX_LINE]
        self._lines.extend(self._line(line) for line in ended if line.strip())
        return True

    def _line(self, data: bytes) -> LogLine:
        return LogLine(time.monotonic(), data[:_MAX_LINE].decode(errors="replace"))


def _write_stderr(data: bytes) -> None:
    """Write all of `data` to file descriptor 2; drop it if that is closed or full."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
