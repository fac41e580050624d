"""Running the server: the engine starts first, the HTTP application is imported meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient

_LOOK_S = 0.1
"""Between two looks at how far loading is."""


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


async def serve(engine: EngineConfig, config: ServerConfig) -> None:
    """Start the engine, answer until SIGINT or SIGTERM, let running requests end, stop.

    Raises:
        PortaLMError: the engine could not start.
    """
    client = EngineClient(engine)
    starting = asyncio.ensure_future(client.start())
    bar = asyncio.create_task(_show_loading(client))
    starting.add_done_callback(lambda _: bar.cancel())
    try:
        # while the engine loads: these take most of a second
        app, metrics, states = await asyncio.to_thread(_import_server)
        names = tuple(config.served_model_names) or (engine.model,)
        state = states.ServerState(
            client=client,
            metrics=metrics.Metrics(client, names[0]),
            model_names=names,
            api_keys=tuple(config.api_keys),
            max_num_queued_reqs=config.max_num_queued_reqs,
        )
        server = app.Server(
            app.uvicorn.Config(
                app.build_app(state),
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
        # it listens while the model is loaded, and says so: not ready
        await asyncio.wait({starting, running}, return_when=asyncio.FIRST_COMPLETED)
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if starting.done() and starting.exception() is not None:
            server.should_exit = True
            await running
        elif server.started and starting.done():
            ready = starting.result()
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
        if starting.done():
            starting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.shutdown()


async def _show_loading(client: EngineClient) -> None:
    """A bar on the terminal, if there is one, until the task is cancelled."""
    if not sys.stderr.isatty():
        return
    from portalm.engine.loading_bar import LoadingBar

    with LoadingBar() as bar:
        while True:
            await asyncio.sleep(_LOOK_S)
            if (progress := client.progress) is not None:
                bar.show(progress.phase, progress.share)


def _import_server() -> tuple[Any, Any, Any]:
    return (
        importlib.import_module("portalm.server.app"),
        importlib.import_module("portalm.server.metrics"),
        importlib.import_module("portalm.server.state"),
    )


def run(engine: EngineConfig, config: ServerConfig) -> None:
    """`serve` in an event loop of its own."""
    import uvloop

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn takes over
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(engine, config))
