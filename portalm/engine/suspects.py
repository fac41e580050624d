"""Which requests may run when an engine keeps ending: so that one that ends engines fails alone.

An engine that ends takes all requests in flight along, and does not say which one was to blame.
After the first time all of them run again. Those that were in flight twice are suspects: half of
them may run at once, then half of those, until one that is to blame is the only suspect in flight.
"""

from __future__ import annotations

from collections.abc import Iterable

_SUSPECT = 2
"""Engines that ended with a request in flight, from which on it is a suspect."""


class Suspects:
    """Requests in flight, and how many engines ended with each."""

    def __init__(self) -> None:
        self.in_flight: set[str] = set()
        self._num_ends: dict[str, int] = {}
        self._limit: int | None = None
        """Suspects that may be in flight at once; None: all."""
        self._held: dict[str, None] = {}
        """Requests that `next` held back, in order."""

    @property
    def held(self) -> list[str]:
        """Requests that `next` held back: to be offered to it again when others have ended."""
        return [*self._held]

    def _is_suspect(self, request_id: str) -> bool:
        return self._num_ends.get(request_id, 0) >= _SUSPECT

    def next(self, open_ids: Iterable[str]) -> list[str]:
        """Those of `open_ids` to send now; they are in flight from here on."""
        chosen = []
        # nobody is a suspect as long as no engine ended: this is asked for every new request
        num_suspects = sum(map(self._is_suspect, self.in_flight)) if self._num_ends else 0
        for request_id in open_ids:
            if request_id in self.in_flight:
                continue
            self._held.pop(request_id, None)
            if self._is_suspect(request_id):
                if self._limit is not None and num_suspects >= self._limit:
                    self._held[request_id] = None
                    continue
                num_suspects += 1
            self.in_flight.add(request_id)
            chosen.append(request_id)
        return chosen

    def ended(self, request_id: str) -> None:
        """A request is over, however it ended."""
        self.in_flight.discard(request_id)
        self._num_ends.pop(request_id, None)
        self._held.pop(request_id, None)
        if not any(map(self._is_suspect, self._num_ends)):
            self._limit = None

    def engine_ended(self) -> list[str]:
        """Nothing is in flight any more; the requests that are to blame."""
        before = [one for one in self.in_flight if self._is_suspect(one)]
        for request_id in self.in_flight:
            self._num_ends[request_id] = self._num_ends.get(request_id, 0) + 1
        self.in_flight.clear()
        if len(before) == 1:
            return before
        num_suspects = len(before) or sum(map(self._is_suspect, self._num_ends))
        if num_suspects:
            self._limit = max(1, num_suspects // 2)
        return []
