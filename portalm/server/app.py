"""The HTTP application, and running it until somebody ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from portalm import __version__
from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.server import chat, completions, health, metrics, models
from portalm.server.auth import Gate
from portalm.server.errors import add_error_handlers
from portalm.server.metrics import Metrics
from portalm.server.state import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and for whom the server answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    """A Unix socket to listen on instead."""
    served_model_names: Sequence[str] = ()
    """Names that clients may use; empty: the model's own."""
    api_keys: Sequence[str] = ()
    """Empty: everybody who can connect."""
    max_num_queued_reqs: int | None = None
    """Requests that may wait before more are refused with 429."""
    shutdown_timeout_s: float = 30.0
    """How long running requests may go on after SIGTERM or Ctrl-C."""
    log_level: str = "warning"


def build_app(state: ServerState) -> FastAPI:
    """All endpoints over one state."""
    app = FastAPI(title="PortaLM", version=__version__, docs_url=None, redoc_url=None)
    app.state.portalm = state
    for module in (completions, chat, models, health, metrics):
        app.include_router(module.router)
    add_error_handlers(app)
    app.add_middleware(Gate, api_keys=state.api_keys)
    return app


async def serve(engine: EngineConfig, config: ServerConfig) -> None:
    """Start the engine, answer until SIGINT or SIGTERM, let running requests end, stop.

    Raises:
        PortaLMError: the engine could not start.
    """
    client = EngineClient(engine)
    try:
        ready = await client.start()
        names = tuple(config.served_model_names) or (engine.model,)
        state = ServerState(
            client=client,
            metrics=Metrics(client, names[0]),
            model_names=names,
            api_keys=tuple(config.api_keys),
            max_num_queued_reqs=config.max_num_queued_reqs,
        )
        server = _Server(
            uvicorn.Config(
                build_app(state),
                host=config.host,
                port=config.port,
                uds=config.uds,
                log_level=config.log_level,
                access_log=False,
                timeout_graceful_shutdown=int(config.shutdown_timeout_s),
            ),
            state,
        )
        # uvicorn handles signals while it serves and raises them again when it is done: by then
        # they have done what they were for
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started:
            where = f"unix:{config.uds}" if config.uds else f"http://{config.host}:{server.port}"
            tokens = ready.num_blocks * ready.block_size
            print(
                f"PortaLM serves {names[0]} on {where} — {ready.device} "
                f"({ready.device_summary}), {ready.dtype}, room for {tokens} tokens of KV cache\n"
                f"try:  curl {where}/v1/chat/completions -H 'Content-Type: application/json' "
                f'-d \'{{"messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
                flush=True,
            )
        await running
    finally:
        await client.shutdown()


class _Server(uvicorn.Server):
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
        self._state.is_draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def run(engine: EngineConfig, config: ServerConfig) -> None:
    """`serve` in an event loop of its own."""
    import uvloop

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn takes over
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(engine, config))
