"""Find the request that crashes engines, so that it fails and no other does.

A crash interrupts all requests in flight and does not show which one caused it. After the first
crash all of them run again. Requests that were in flight in two crashes are suspects: half of them
may run at once, then half of those, until the only suspect in flight is the one to fail.
"""

from __future__ import annotations

from collections.abc import Iterable

_SUSPECT_CRASHES = 2
"""Crashes with a request in flight that make it a suspect."""


class Suspects:
    """Requests in flight, and the number of crashes that each was in."""

    def __init__(self) -> None:
        self.in_flight: set[str] = set()
        self._num_crashes: dict[str, int] = {}
        self._limit: int | None = None
        """Maximum number of suspects in flight; None: no limit."""
        self._held: dict[str, None] = {}
        """Requests that `admit` held back, in order."""

    @property
    def held(self) -> list[str]:
        """Requests that `admit` held back; offer them again when other requests have ended."""
        return [*self._held]

    def _is_suspect(self, request_id: str) -> bool:
        return self._num_crashes.get(request_id, 0) >= _SUSPECT_CRASHES

    def admit(self, open_ids: Iterable[str]) -> list[str]:
        """Return those of `open_ids` to send now; they count as in flight from here on."""
        chosen = []
        # without a crash there are no suspects to count: this runs for every new request
        num_suspects = sum(map(self._is_suspect, self.in_flight)) if self._num_crashes else 0
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
        """Forget a request that has ended."""
        self.in_flight.discard(request_id)
        self._num_crashes.pop(request_id, None)
        self._held.pop(request_id, None)
        if not any(map(self._is_suspect, self._num_crashes)):
            self._limit = None

    def engine_crashed(self) -> list[str]:
        """Record a crash of the engine; return the requests that caused it, if they are known."""
        before = [one for one in self.in_flight if self._is_suspect(one)]
        for request_id in self.in_flight:
            self._num_crashes[request_id] = self._num_crashes.get(request_id, 0) + 1
        self.in_flight.clear()
        if len(before) == 1:
            return before
        num_suspects = len(before) or sum(map(self._is_suspect, self._num_crashes))
        if num_suspects:
            self._limit = max(1, num_suspects // 2)
        return []
