"""The engine's current activity, in memory shared with its client, to detect a step that hangs.

Messages would not work: an engine that hangs in a step sends none. The engine writes a few numbers
to a file that both processes have mapped. Times are from time.monotonic(), which all processes of a
machine share.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = struct.Struct("<qdqd")
_PER_TOKEN_S = 0.02
_SLOWER_THAN_EVER = 10.0
DEADLINE_S = 10.0
"""Seconds that a step of any size may take."""


@dataclass(frozen=True, slots=True)
class PulseReading:
    """The engine's activity when it last wrote."""

    num_steps: int
    """Steps begun so far."""
    since: float
    """time.monotonic() when the current step, or the pause after the last step, began."""
    num_tokens: int
    """Tokens of the current step; 0 between steps."""
    deadline_s: float
    """Seconds that the step may take."""

    def overdue_s(self, *, work_since: float | None) -> float:
        """Seconds past the deadline; 0 or less if the engine is in time.

        Args:
            work_since: time.monotonic() since when the engine has requests; None: it has none.
        """
        if self.num_tokens:
            return time.monotonic() - self.since - self.deadline_s
        if work_since is None:
            return 0.0
        # between two steps, or before the first
        return time.monotonic() - max(self.since, work_since) - DEADLINE_S


class Pulse:
    """The memory-mapped file. The engine calls `begin` and `end`, the client calls `read`."""

    def __init__(self, path: Path) -> None:
        """Map the file `path`, creating it if necessary."""
        path.touch(mode=0o600)
        with path.open("a+b") as file:
            if file.tell() < _NUMBERS.size:
                file.write(bytes(_NUMBERS.size - file.tell()))
                file.flush()
            self._memory = mmap.mmap(file.fileno(), _NUMBERS.size)
        self._num_steps = 0
        self._slowest = 0.0

    def begin(self, num_tokens: int) -> None:
        """Record that a step of `num_tokens` tokens begins.

        Its deadline grows with its size: by 20 ms per token, or by ten times the time per token of
        the slowest large step so far, whichever is more.
        """
        per_token = max(_PER_TOKEN_S, _SLOWER_THAN_EVER * self._slowest)
        self._num_steps += 1
        self._write(num_tokens, DEADLINE_S + num_tokens * per_token)

    def end(self) -> None:
        """Record that the step has ended."""
        reading = self.read()
        if reading.num_tokens >= 64:  # a small step's time is mostly fixed overhead
            self._slowest = max(
                self._slowest, (time.monotonic() - reading.since) / reading.num_tokens
            )
        self._write(0, DEADLINE_S)

    def _write(self, num_tokens: int, deadline_s: float) -> None:
        _NUMBERS.pack_into(
            self._memory, 0, self._num_steps, time.monotonic(), num_tokens, deadline_s
        )

    def read(self) -> PulseReading:
        """Read what the engine last wrote."""
        return PulseReading(*_NUMBERS.unpack_from(self._memory))
