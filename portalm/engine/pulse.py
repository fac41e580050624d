"""What an engine is doing right now, in memory that its client can look into.

A message would not do: an engine that hangs in a step sends none. The engine writes numbers to
a file that both have mapped; the client reads them when it is asked how things are. Times are of
time.monotonic(), which all processes of a machine share.
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
"""What every step may take, however small."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What the engine last wrote."""

    num_steps: int
    """Begun so far."""
    since: float
    """When it began what it is doing."""
    num_tokens: int
    """Of the step that it is in; 0: it is not in one."""
    deadline_s: float
    """How long that may take."""

    def overdue_s(self, *, work_since: float | None) -> float:
        """Seconds past its deadline; 0 or less: all is well.

        Args:
            work_since: from when on the engine had work (time.monotonic()); None: it has none.
        """
        if self.num_tokens:
            return time.monotonic() - self.since - self.deadline_s
        if work_since is None:
            return 0.0
        # between two steps, or before the first one
        return time.monotonic() - max(self.since, work_since) - DEADLINE_S


class Pulse:
    """The mapped file. The engine calls `begin` and `end`, the client `read`."""

    def __init__(self, path: Path) -> None:
        """Map `path`, made if it is not there."""
        path.touch(mode=0o600)
        with path.open("a+b") as file:
            if file.tell() < _NUMBERS.size:
                file.write(bytes(_NUMBERS.size - file.tell()))
                file.flush()
            self._memory = mmap.mmap(file.fileno(), _NUMBERS.size)
        self._num_steps = 0
        self._slowest = 0.0

    def begin(self, num_tokens: int) -> None:
        """A step of so many tokens begins.

        Its deadline grows with its size: by 20 ms a token, or by ten times what a token of the
        slowest large step took so far, whichever is more.
        """
        per_token = max(_PER_TOKEN_S, _SLOWER_THAN_EVER * self._slowest)
        self._num_steps += 1
        self._write(num_tokens, DEADLINE_S + num_tokens * per_token)

    def end(self) -> None:
        """The step has ended."""
        sign = self.read()
        if sign.num_tokens >= 64:  # of small ones the fixed part is most
            self._slowest = max(self._slowest, (time.monotonic() - sign.since) / sign.num_tokens)
        self._write(0, DEADLINE_S)

    def _write(self, num_tokens: int, deadline_s: float) -> None:
        _NUMBERS.pack_into(
            self._memory, 0, self._num_steps, time.monotonic(), num_tokens, deadline_s
        )

    def read(self) -> Sign:
        """What the engine last wrote."""
        return Sign(*_NUMBERS.unpack_from(self._memory))
