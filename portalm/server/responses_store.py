"""Stored responses: in memory, bounded in number and size, visible to their own tenant only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from portalm.errors import InvalidRequest, PortaLMError


class ResponseUnknown(InvalidRequest):
    """No response with this id is stored for the tenant."""

    def __init__(self, response_id: str, *, param: str = "response_id") -> None:
        super().__init__(
            f"response {response_id!r} is unknown: it was deleted, was created with store false, "
            f"or was dropped as the oldest when the store was full",
            param=param,
        )


class StoreFull(PortaLMError):
    """The store is full of responses that are still being written."""


@dataclass(slots=True)
class StoredResponse:
    """A response, and what is needed to continue from it."""

    response: dict[str, Any]
    """OpenAI's response object in its current state."""
    items: list[dict[str, Any]]
    """Items of the conversation before it, without its own output."""
    num_earlier: int = 0
    """Number of `items` from earlier responses."""
    task: asyncio.Task[None] | None = None
    """The task that writes a background response."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Events so far of a streamed background response."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by a new one, when there are new events or the task has ended."""
    num_bytes: int = 0
    """Size as JSON, as of the last `put`."""

    @property
    def is_running(self) -> bool:
        """Whether it is still being written in the background."""
        return self.task is not None and not self.task.done()

    def notify(self) -> None:
        """Wake the followers: there are new events, or the task has ended."""
        before, self.news = self.news, asyncio.Event()
        before.set()

    async def follow(self, *, after: int = -1) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events after number `after`, including future ones."""
        index = after + 1
        while True:
            while index < len(self.events):
                yield self.events[index]
                index += 1
            if not self.is_running:
                return
            await self.news.wait()


class ResponseStore:
    """Responses of all tenants. The oldest are dropped when it is full."""

    def __init__(
        self,
        *,
        max_responses: int = 4096,
        max_bytes: int = 128 << 20,
        tenant_share: float = 0.5,
    ) -> None:
        """Create an empty store.

        Args:
            max_responses: maximum number of responses of all tenants.
            max_bytes: maximum size of all responses as JSON.
            tenant_share: share of both limits that one tenant may use, 0 to 1.
        """
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._tenant_share = tenant_share
        self._tenants: dict[str, dict[str, StoredResponse]] = {}

    def get(self, tenant: str, response_id: str, *, param: str = "response_id") -> StoredResponse:
        """A response of a tenant. Raises `ResponseUnknown`."""
        stored = self._tenants.get(tenant, {}).get(response_id)
        if stored is None:
            raise ResponseUnknown(response_id, param=param)
        return stored

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Store a response, or update the size of a stored one. Raises `StoreFull`."""
        stored.num_bytes = len(msgspec.json.encode([stored.response, stored.items, stored.events]))
        self._tenants.setdefault(tenant, {})[stored.response["id"]] = stored
        while self._is_over([tenant]):
            self._drop_oldest([tenant], stored)
        while self._is_over(list(self._tenants)):
            largest_first = sorted(self._tenants, key=self._num_bytes, reverse=True)
            self._drop_oldest(largest_first, stored)

    def delete(self, tenant: str, response_id: str) -> None:
        """Delete a response, and cancel writing it. Raises `ResponseUnknown`."""
        stored = self.get(tenant, response_id)
        if stored.task is not None:
            stored.task.cancel()
        self._remove(tenant, response_id)

    def _is_over(self, tenants: Sequence[str]) -> bool:
        """Whether one tenant, or all tenants together, exceed their limits."""
        share = self._tenant_share if len(tenants) == 1 else 1.0
        num_responses = sum(len(self._tenants.get(name, ())) for name in tenants)
        num_bytes = sum(map(self._num_bytes, tenants))
        return num_responses > share * self._max_responses or num_bytes > share * self._max_bytes

    def _num_bytes(self, tenant: str) -> int:
        return sum(stored.num_bytes for stored in self._tenants.get(tenant, {}).values())

    def _drop_oldest(self, tenants: Sequence[str], newest: StoredResponse) -> None:
        """Delete the oldest finished response of the first tenant that has one.

        Raises:
            StoreFull: no tenant has one; `newest` itself is deleted.
        """
        for tenant in tenants:
            for response_id, stored in self._tenants[tenant].items():
                if stored is not newest and not stored.is_running:
                    self._remove(tenant, response_id)
                    return
        for tenant in tenants:
            if self._tenants[tenant].get(newest.response["id"]) is newest:
                self._remove(tenant, newest.response["id"])
        raise StoreFull("the store of responses is full: try again when some have ended")

    def _remove(self, tenant: str, response_id: str) -> None:
        del self._tenants[tenant][response_id]
        if not self._tenants[tenant]:
            del self._tenants[tenant]
