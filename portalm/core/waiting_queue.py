"""Requests that wait for blocks, in the order in which they are served."""

from __future__ import annotations

import heapq
from collections import Counter

from portalm.core.request import Request, RequestStatus

Key = tuple[int, int]
"""(priority, arrival): unique, lower is served first."""


class WaitingQueue:
    """A heap of waiting requests for each tenant: adding and taking cost O(log n).

    Among the first requests of each tenant with equal priority, the one whose tenant has the
    fewest running requests is served next: a thousand requests of one tenant do not delay a single
    one of another.

    A request that ends while it waits stays in its heap, ignored, until it reaches the top or until
    more than half of the heaps' entries are ended requests.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._heaps: dict[str, list[tuple[Key, Request]]] = {}
        self._num_running: Counter[str] = Counter()
        self._num_queued = 0
        self._num_ended = 0

    def __len__(self) -> int:
        return self._num_queued - self._num_ended

    def push(self, key: Key, request: Request) -> None:
        """Queue `request`, whose status is waiting."""
        heapq.heappush(self._heaps.setdefault(request.tenant, []), (key, request))
        self._num_queued += 1

    def first(self) -> Request | None:
        """The request to serve next; None if the queue is empty."""
        best: tuple[tuple[int, int, int], Request] | None = None
        for tenant in [*self._heaps]:
            heap = self._heaps[tenant]
            while heap and heap[0][1].status is not RequestStatus.WAITING:
                heapq.heappop(heap)
                self._num_queued -= 1
                self._num_ended -= 1
            if not heap:
                del self._heaps[tenant]
                continue
            (priority, arrival), request = heap[0]
            rank = (priority, self._num_running[tenant], arrival)
            if best is None or rank < best[0]:
                best = rank, request
        return None if best is None else best[1]

    def pop(self, request: Request) -> None:
        """Remove `request`, which `first` has just returned."""
        heapq.heappop(self._heaps[request.tenant])
        self._num_queued -= 1

    def note_running(self, request: Request, change: int) -> None:
        """Count that a request of this tenant started (1) or stopped (-1) running."""
        self._num_running[request.tenant] += change
        if not self._num_running[request.tenant]:
            del self._num_running[request.tenant]

    def note_end(self) -> None:
        """Count that a queued request has ended."""
        self._num_ended += 1
        if self._num_ended > self._num_queued // 2:
            for heap in self._heaps.values():
                heap[:] = [e for e in heap if e[1].status is RequestStatus.WAITING]
                heapq.heapify(heap)
            self._num_queued = sum(map(len, self._heaps.values()))
            self._num_ended = 0
