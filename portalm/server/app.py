"""The HTTP application, and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from portalm import __version__
from portalm.server.auth import Gate
from portalm.server.errors import add_error_handlers
from portalm.server.observability.watch import Doorkeeper
from portalm.server.routers import (
    chat,
    completions,
    embeddings,
    health,
    metrics,
    models,
    page,
    responses,
    scores,
)
from portalm.server.state import ServerState

_MAX_HEADER_BYTES = 64 << 10

_LAST_WORDS_S = 5.0
"""How long the ends of answers that were cut off may take to reach their clients."""

_LOOK_S = 0.02


def build_app(state: ServerState) -> FastAPI:
    """All endpoints over one state."""
    app = FastAPI(title="PortaLM", version=__version__, docs_url=None, redoc_url=None)
    app.state.portalm = state
    for module in (completions, chat, responses, embeddings, scores, models, health, metrics, page):
        app.include_router(module.router)
    add_error_handlers(app)
    app.add_middleware(Gate, api_keys=state.api_keys)
    if state.allowed_origins:  # outside of the gate: a browser asks first, without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.allowed_origins,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
        )
    app.add_middleware(Doorkeeper, metrics=state.metrics)  # the last one added is the outermost
    return app


class Protocol(HttpToolsProtocol):
    """Uvicorn's, with a limit to headers: else they would be collected for ever."""

    _num_header_bytes: int | None = None
    """Of headers that are not complete, so far; None: none are."""

    def data_received(self, data: bytes) -> None:
        """Bytes of the connection."""
        if self._num_header_bytes is not None:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > _MAX_HEADER_BYTES:
                self.send_400_response(f"The headers are larger than {_MAX_HEADER_BYTES} bytes.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins with its headers."""
        self._num_header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The headers of a request are there."""
        self._num_header_bytes = None
        super().on_headers_complete()


class Server(uvicorn.Server):
    """Uvicorn that lets requests end before it stops to listen, and cuts off those that do not."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, *, shutdown_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._state = state
        self._shutdown_timeout_s = shutdown_timeout_s

    @property
    def port(self) -> int:
        """The port that was bound (of interest where 0 was asked for); no Unix socket has one."""
        with contextlib.suppress(IndexError, AttributeError):
            if self.config.uds is None:
                return int(self.servers[0].sockets[0].getsockname()[1])
        return self.config.port

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first time: draining from now on. The second time: the end, at once."""
        if self._state.is_draining:
            self.force_exit = True
        self._state.is_draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]

    async def main_loop(self) -> None:
        """Serve until a signal; then, still listening but not ready, until what runs has ended."""
        await super().main_loop()
        if not self.started or not self._state.is_draining:
            return
        client = self._state.client
        await self._wait_while(lambda: client.has_open_answers, self._shutdown_timeout_s)
        if not self.force_exit:
            client.abort_all()
            await self._wait_while(lambda: bool(self.server_state.tasks), _LAST_WORDS_S)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()  # it has nothing to say, does not read, or time is up

    async def _wait_while(self, is_so: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while is_so() and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_LOOK_S)
