"""Responses that can be asked for later: in memory, bounded, each seen by its own tenant only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from portalm.errors import InvalidRequest, PortaLMError


class ResponseUnknown(InvalidRequest):
    """A response that was never stored for this tenant, or is not kept any more."""

    def __init__(self, response_id: str, *, param: str = "response_id") -> None:
        super().__init__(
            f"response {response_id!r} is not known: it was deleted, was sent with store false, "
            f"or was the oldest when there was no room",
            param=param,
        )


class StoreFull(PortaLMError):
    """No room for another response: all that are kept are still being written."""


@dataclass(slots=True)
class StoredResponse:
    """A response, and what is needed to go on from it."""

    response: dict[str, Any]
    """OpenAI's response object, as far as it has come."""
    items: list[dict[str, Any]]
    """The conversation up to it, its own output left out."""
    num_earlier: int = 0
    """How many of `items` came from the responses before it."""
    task: asyncio.Task[None] | None = None
    """Writes it, where it goes on in the background."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What was streamed so far, of one that goes on in the background."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, when there are more events or the task has ended."""
    num_bytes: int = 0

    @property
    def is_running(self) -> bool:
        """It is still being written."""
        return self.task is not None and not self.task.done()

    def tell(self) -> None:
        """There is something new for who follows."""
        before, self.news = self.news, asyncio.Event()
        before.set()

    async def follow(self, *, after: int = -1) -> AsyncGenerator[dict[str, Any], None]:
        """Its events behind the one numbered `after`, those to come as well."""
        index = after + 1
        while True:
            while index < len(self.events):
                yield self.events[index]
                index += 1
            if not self.is_running:
                return
            await self.news.wait()


class ResponseStore:
    """The responses of all tenants. The oldest go when there is no room."""

    def __init__(
        self,
        *,
        max_responses: int = 4096,
        max_bytes: int = 128 << 20,
        tenant_share: float = 0.5,
    ) -> None:
        """Nothing kept yet.

        Args:
            max_responses: of all tenants.
            max_bytes: of all tenants; as JSON.
            tenant_share: the part of both that one tenant may take.
        """
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._tenant_share = tenant_share
        self._tenants: dict[str, dict[str, StoredResponse]] = {}

    def get(self, tenant: str, response_id: str, *, param: str = "response_id") -> StoredResponse:
        """A tenant's response. Raises `ResponseUnknown`."""
        stored = self._tenants.get(tenant, {}).get(response_id)
        if stored is None:
            raise ResponseUnknown(response_id, param=param)
        return stored

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Keep a response, or count again what it has grown to. Raises `StoreFull`."""
        stored.num_bytes = len(msgspec.json.encode([stored.response, stored.items, stored.events]))
        self._tenants.setdefault(tenant, {})[stored.response["id"]] = stored
        while self._is_over([tenant]):
            self._drop_oldest([tenant], stored)
        while self._is_over(list(self._tenants)):
            largest_first = sorted(self._tenants, key=self._num_bytes, reverse=True)
            self._drop_oldest(largest_first, stored)

    def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response; one that is being written is ended. Raises `ResponseUnknown`."""
        stored = self.get(tenant, response_id)
        if stored.task is not None:
            stored.task.cancel()
        self._forget(tenant, response_id)

    def _is_over(self, tenants: Sequence[str]) -> bool:
        """Whether one tenant, or all together, take more than they may."""
        share = self._tenant_share if len(tenants) == 1 else 1.0
        num_responses = sum(len(self._tenants.get(name, ())) for name in tenants)
        num_bytes = sum(map(self._num_bytes, tenants))
        return num_responses > share * self._max_responses or num_bytes > share * self._max_bytes

    def _num_bytes(self, tenant: str) -> int:
        return sum(stored.num_bytes for stored in self._tenants.get(tenant, {}).values())

    def _drop_oldest(self, tenants: Sequence[str], newest: StoredResponse) -> None:
        """Forget one of the first of `tenants` that has one; if none has, `newest` itself."""
        for tenant in tenants:
            for response_id, stored in self._tenants[tenant].items():
                if stored is not newest and not stored.is_running:
                    self._forget(tenant, response_id)
                    return
        for tenant in tenants:
            if self._tenants[tenant].get(newest.response["id"]) is newest:
                self._forget(tenant, newest.response["id"])
        raise StoreFull("no room for another response: try again when some have ended")

    def _forget(self, tenant: str, response_id: str) -> None:
        del self._tenants[tenant][response_id]
        if not self._tenants[tenant]:
            del self._tenants[tenant]
