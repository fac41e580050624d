"""The HTTP application, and the server that runs it."""

from __future__ import annotations

import contextlib

import uvicorn
from fastapi import FastAPI

from portalm import __version__
from portalm.server import chat, completions, health, metrics, models, page
from portalm.server.auth import Gate
from portalm.server.errors import add_error_handlers
from portalm.server.state import ServerState


def build_app(state: ServerState) -> FastAPI:
    """All endpoints over one state."""
    app = FastAPI(title="PortaLM", version=__version__, docs_url=None, redoc_url=None)
    app.state.portalm = state
    for module in (completions, chat, models, health, metrics, page):
        app.include_router(module.router)
    add_error_handlers(app)
    app.add_middleware(Gate, api_keys=state.api_keys)
    return app


class Server(uvicorn.Server):
    """Uvicorn that says it is draining before it stops to listen."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state

    @property
    def port(self) -> int:
        """The port that was bound (of interest where 0 was asked for)."""
        with contextlib.suppress(IndexError, AttributeError):
            return int(self.servers[0].sockets[0].getsockname()[1])
        return self.config.port

    def handle_exit(self, sig: int, frame: object) -> None:
        """Draining from now on: what is asked is refused, what runs may end."""
        self._state.is_draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
