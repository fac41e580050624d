"""The HTTP application, and the uvicorn server that runs it."""

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
from portalm.server.observability.watch import RequestOrigins
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

_FLUSH_TIMEOUT_S = 5.0
"""Maximum time for the last chunks of aborted answers to reach their clients."""

_POLL_S = 0.02


def build_app(state: ServerState) -> FastAPI:
    """Build the application: all endpoints over one state."""
    app = FastAPI(title="PortaLM", version=__version__, docs_url=None, redoc_url=None)
    app.state.portalm = state
    for module in (completions, chat, responses, embeddings, scores, models, health, metrics, page):
        app.include_router(module.router)
    add_error_handlers(app)
    app.add_middleware(Gate, api_keys=state.api_keys)
    if state.allowed_origins:  # outside the gate: preflight requests of browsers have no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.allowed_origins,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
        )
    app.add_middleware(RequestOrigins, metrics=state.metrics)  # added last: the outermost
    return app


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol with a limit on the size of headers, which it does not have."""

    _num_header_bytes: int | None = None
    """Bytes received of incomplete headers; None: no headers are being received."""

    def data_received(self, data: bytes) -> None:
        """Receive bytes; respond with 400 if the headers are too large."""
        if self._num_header_bytes is not None:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > _MAX_HEADER_BYTES:
                self.send_400_response(f"The headers are larger than {_MAX_HEADER_BYTES} bytes.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Start to count the bytes of a request's headers."""
        self._num_header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop counting: the headers are complete."""
        self._num_header_bytes = None
        super().on_headers_complete()


class Server(uvicorn.Server):
    """Uvicorn server that finishes requests before it stops listening, and aborts slow ones."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, *, shutdown_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._state = state
        self._shutdown_timeout_s = shutdown_timeout_s

    @property
    def port(self) -> int:
        """The bound port, also if port 0 was configured; the configured one for a Unix socket."""
        with contextlib.suppress(IndexError, AttributeError):
            if self.config.uds is None:
                return int(self.servers[0].sockets[0].getsockname()[1])
        return self.config.port

    def handle_exit(self, sig: int, frame: object) -> None:
        """Start to drain on the first signal, exit at once on the second."""
        if self._state.is_draining:
            self.force_exit = True
        self._state.is_draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]

    async def main_loop(self) -> None:
        """Serve until a signal, then until running requests have ended (listening, not ready)."""
        await super().main_loop()
        if not self.started or not self._state.is_draining:
            return
        client = self._state.client
        await self._wait_while(lambda: client.has_open_answers, self._shutdown_timeout_s)
        if not self.force_exit:
            client.abort_all()
            await self._wait_while(lambda: bool(self.server_state.tasks), _FLUSH_TIMEOUT_S)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()  # idle, not reading, or out of time

    async def _wait_while(self, condition: Callable[[], bool], timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while condition() and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_POLL_S)
