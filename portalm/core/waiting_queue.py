"""Requests that wait for blocks, in the order in which they are served."""

from __future__ import annotations

import heapq

from portalm.core.request import Request, RequestStatus

Key = tuple[int, int]
"""(priority, arrival): unique, lower is served first."""


class WaitingQueue:
    """A heap of waiting requests: adding and taking cost O(log n), leaving O(1) amortised.

    A request that ends while it waits stays in the heap, where nobody sees it, until it
    surfaces or until half of the heap is such requests.
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self._heap: list[tuple[Key, Request]] = []
        self._num_ended = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_ended

    def push(self, key: Key, request: Request) -> None:
        """Queue `request`, whose status is waiting."""
        heapq.heappush(self._heap, (key, request))

    def first(self) -> Request | None:
        """The request to be served next; None if nobody waits."""
        heap = self._heap
        while heap:
            request = heap[0][1]
            if request.status is RequestStatus.WAITING:
                return request
            heapq.heappop(heap)
            self._num_ended -= 1
        return None

    def pop(self) -> None:
        """Take out what `first` gave just before."""
        heapq.heappop(self._heap)

    def note_end(self) -> None:
        """One of the queued requests has ended."""
        self._num_ended += 1
        if self._num_ended > len(self._heap) // 2:
            self._heap = [e for e in self._heap if e[1].status is RequestStatus.WAITING]
            heapq.heapify(self._heap)
            self._num_ended = 0
