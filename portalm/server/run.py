"""Running the server: the engine starts first, the HTTP application is imported meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.messages import EngineReady
from portalm.logs import LogConfig, write_logs

logger = logging.getLogger(__name__)


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
    logs: LogConfig = field(default_factory=LogConfig)
    """How this process and the engine's write their logs."""
    log_requests: bool = False
    """Log prompts and answers too."""
    log_stats: bool = True
    """Log throughput while there is traffic."""
    otlp_traces_endpoint: str | None = None
    """URL of a collector of OpenTelemetry traces; None: no traces."""


async def serve(engine: EngineConfig, config: ServerConfig) -> None:
    """Start the engine, answer until SIGINT or SIGTERM, let running requests end, stop.

    Raises:
        PortaLMError: the engine could not start, or traces were asked for and cannot be sent.
    """
    names = tuple(config.served_model_names) or (engine.model,)
    tracer = await asyncio.to_thread(_start_tracer, config, names[0])
    client = EngineClient(engine, logs=config.logs)
    starting = asyncio.ensure_future(client.start())
    tasks: list[asyncio.Task[None]] = []
    try:
        # while the engine loads: these take most of a second
        app, metrics, states, request_log = await asyncio.to_thread(_import_server)
        state = states.ServerState(
            client=client,
            metrics=metrics.Metrics(client, names[0]),
            model_names=names,
            api_keys=tuple(config.api_keys),
            max_num_queued_reqs=config.max_num_queued_reqs,
            observers=[
                request_log.RequestLog(with_content=config.log_requests),
                *([tracer] if tracer is not None else []),
            ],
        )
        if config.log_stats:
            tasks.append(asyncio.create_task(request_log.log_throughput(client)))
        server = app.Server(
            app.uvicorn.Config(
                app.build_app(state),
                host=config.host,
                port=config.port,
                uds=config.uds,
                log_config=None,  # it writes to the same log as everything else
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
            _say_where(config, names[0], server.port, starting.result())
        await running
        if starting.done():
            starting.result()
    finally:
        for task in (starting, *tasks):
            task.cancel()
        await asyncio.gather(starting, *tasks, return_exceptions=True)
        await client.shutdown()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def _say_where(config: ServerConfig, model: str, port: int, ready: EngineReady) -> None:
    """Tell the user that requests are taken now."""
    where = f"unix:{config.uds}" if config.uds else f"http://{config.host}:{port}"
    text = (
        f"PortaLM serves {model} on {where} — {ready.device} ({ready.device_summary}), "
        f"{ready.dtype}, room for {ready.num_blocks * ready.block_size} tokens of KV cache"
    )
    if config.logs.format == "json":
        logger.info(text)
        return
    print(
        f"{text}\n"
        f"try:  curl {where}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
        flush=True,
    )


def _start_tracer(config: ServerConfig, model: str) -> Any:
    """The tracer that was asked for, or None. What it imports is an extra."""
    if config.otlp_traces_endpoint is None:
        return None
    tracing = importlib.import_module("portalm.server.tracing")
    return tracing.Tracer(config.otlp_traces_endpoint, model)


def _import_server() -> tuple[Any, ...]:
    names = ("app", "metrics", "state", "request_log")
    return tuple(importlib.import_module(f"portalm.server.{name}") for name in names)


def run(engine: EngineConfig, config: ServerConfig) -> None:
    """`serve` in an event loop of its own."""
    import uvloop

    write_logs("server", config.logs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn takes over
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(engine, config))
