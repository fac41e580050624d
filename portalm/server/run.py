"""Run the server: the HTTP application is imported while the engine starts."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portalm.config import EngineConfig, Task
from portalm.engine.client import EngineClient
from portalm.engine.messages import EngineReady
from portalm.errors import ConfigError
from portalm.logs import LogConfig, write_logs
from portalm.server.api_keys import ApiKeys
from portalm.server.chat_plan import AnswerFormat

logger = logging.getLogger(__name__)

_EXAMPLES: dict[Task, tuple[str, str]] = {
    "generate": (
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "Hello!"}]}',
    ),
    "embed": ("/v1/embeddings", '{"input": "Hello!"}'),
    "score": ("/score", '{"text_1": "Hello!", "text_2": "Good morning!"}'),
}
"""Path and body of the example request printed at startup, by task of the model."""

_POLL_S = 0.1
"""Interval between updates of the loading bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    """Path of a Unix socket to listen on instead of host and port."""
    served_model_names: Sequence[str] = ()
    """Names of the model that clients may use; empty: the engine's model setting."""
    api_keys: Sequence[str] = ()
    """Accepted API keys. Without any here or in `api_key_file`, no key is required."""
    api_key_file: str | None = None
    """File with more API keys, one per line; read again on SIGHUP."""
    allowed_origins: Sequence[str] = ()
    """Origins whose web pages may call the server (CORS); * allows all."""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    """Certificate file; with one, the server uses HTTPS."""
    ssl_ca_certs: str | None = None
    """File of certificate authorities that client certificates are verified with."""
    ssl_cert_reqs: int = ssl.CERT_NONE
    """Client certificates: 0 not requested, 1 verified if sent, 2 required."""
    max_num_queued_reqs: int | None = None
    """Maximum number of answers in the queue; more get status 429. None: no limit."""
    max_num_queued_tokens: int | None = None
    """Maximum number of prompt tokens in the queue; more get status 429. None: no limit."""
    queue_timeout_s: float | None = None
    """Maximum time in the queue; later, a request gets status 503. None: no limit."""
    trust_request_chat_template: bool = False
    """Accept chat templates in requests. A template is a program that may never end."""
    shutdown_timeout_s: float = 30.0
    """Time for running requests to finish after SIGTERM or Ctrl-C; then they are aborted."""
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    """How the model writes tool calls and reasoning."""
    logs: LogConfig = field(default_factory=LogConfig)
    """Format and level of the logs of this process and the engine's."""
    log_requests: bool = False
    """Also log prompts and answers."""
    log_stats: bool = True
    """Log the throughput every ten seconds while there is traffic."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector to send traces to; None: no traces."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the flag and the fix."""
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} must be at least 1, not {value}: every request is queued"
                )
        if self.queue_timeout_s is not None and not self.queue_timeout_s > 0:
            raise ConfigError(f"queue_timeout must be above 0 seconds, not {self.queue_timeout_s}")
        if not self.shutdown_timeout_s >= 0:
            raise ConfigError(
                f"shutdown_timeout must be at least 0 seconds, not {self.shutdown_timeout_s}"
            )
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError(
                "HTTPS needs --ssl-certfile (and --ssl-keyfile, if the key is in a file of its own)"
            )


async def serve(engine: EngineConfig, config: ServerConfig) -> None:
    """Start the engine, serve until SIGINT or SIGTERM, finish running requests, shut down.

    Raises:
        PortaLMError: the engine could not start, or traces cannot be sent as configured.
    """
    key_file = None if config.api_key_file is None else Path(config.api_key_file)
    keys = ApiKeys(config.api_keys, key_file)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
    names = tuple(config.served_model_names) or (engine.model,)
    tracer = await asyncio.to_thread(_start_tracer, config, names[0])
    client = EngineClient(engine, logs=config.logs)
    starting = asyncio.ensure_future(_start(client, config.answer_format))
    server: Any = None
    tasks: list[asyncio.Task[None]] = []
    bar = asyncio.create_task(_show_loading(client))
    starting.add_done_callback(lambda _: bar.cancel())
    try:
        # imported while the engine loads: this takes most of a second
        app, metrics, states, request_log = await asyncio.to_thread(_import_server)
        state = states.ServerState(
            client=client,
            metrics=metrics.Metrics(client, names[0]),
            model_names=names,
            api_keys=keys,
            allowed_origins=tuple(config.allowed_origins),
            max_num_queued_reqs=config.max_num_queued_reqs,
            answer_format=config.answer_format,
            max_num_queued_tokens=config.max_num_queued_tokens,
            queue_timeout_s=config.queue_timeout_s,
            trust_request_chat_template=config.trust_request_chat_template,
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
                log_config=None,  # uvicorn logs through the root logger, as the rest of the process
                access_log=False,
                http=app.Protocol,
                lifespan="off",
                timeout_graceful_shutdown=1,  # Server has already waited
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
                ssl_ca_certs=config.ssl_ca_certs,
                ssl_cert_reqs=config.ssl_cert_reqs,
            ),
            state,
            shutdown_timeout_s=config.shutdown_timeout_s,
        )
        _load(server.config)
        # uvicorn handles signals while it serves, and raises them again afterwards, when they
        # have no further purpose
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        running = asyncio.create_task(server.serve())
        # it listens while the model is loading, and reports that it is not ready
        await asyncio.wait({starting, running}, return_when=asyncio.FIRST_COMPLETED)
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if starting.done() and starting.exception() is not None:
            server.should_exit = True
            await running
        elif server.started and starting.done():
            _report_ready(config, names[0], server.port, starting.result())
        await running
        if starting.done():
            starting.result()
    finally:
        for task in (starting, *tasks):
            task.cancel()
        await asyncio.gather(starting, *tasks, return_exceptions=True)
        await client.shutdown(at_once=server is not None and server.force_exit)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _start(client: EngineClient, answer_format: AnswerFormat) -> EngineReady:
    ready = await client.start()
    answer_format.check(client.tokenizer)
    return ready


async def _show_loading(client: EngineClient) -> None:
    """Show a loading bar on the terminal, if there is one, until the task is cancelled."""
    if not sys.stderr.isatty():
        return
    from portalm.progress import LoadingBar

    with LoadingBar() as bar:
        while True:
            await asyncio.sleep(_POLL_S)
            if (progress := client.progress) is not None:
                bar.show(progress.phase, progress.share)


def _load(config: Any) -> None:
    """Load uvicorn's configuration. Raises `ConfigError` for unusable certificates."""
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the certificate or its key cannot be used: {error}") from None


def _report_ready(config: ServerConfig, model: str, port: int, ready: EngineReady) -> None:
    """Report that the server is ready, and where it listens."""
    scheme = "https" if config.ssl_certfile else "http"
    where = f"unix:{config.uds}" if config.uds else f"{scheme}://{config.host}:{port}"
    tokens = ready.num_blocks * ready.block_size
    cache = f", room for {tokens} tokens of KV cache" if tokens else ""
    text = (
        f"PortaLM serves {model} on {where} — {ready.device} ({ready.device_summary}), "
        f"{ready.dtype}{cache}"
    )
    if config.logs.format == "json":
        logger.info(text)
        return
    path, example = _EXAMPLES[ready.tasks[0]]
    print(
        f"{text}\ntry:  curl {where}{path} -H 'Content-Type: application/json' -d '{example}'",
        flush=True,
    )


def _start_tracer(config: ServerConfig, model: str) -> Any:
    """The configured tracer, or None. It is imported only then: its packages are an extra."""
    if config.otlp_traces_endpoint is None:
        return None
    tracing = importlib.import_module("portalm.server.observability.tracing")
    return tracing.Tracer(config.otlp_traces_endpoint, model)


def _import_server() -> tuple[Any, ...]:
    names = ("app", "observability.metrics", "state", "observability.request_log")
    return tuple(importlib.import_module(f"portalm.server.{name}") for name in names)


def run(engine: EngineConfig, config: ServerConfig) -> None:
    """Run `serve` in a new event loop."""
    import uvloop

    write_logs("server", config.logs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn takes over
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(engine, config))
