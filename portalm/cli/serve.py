"""`portalm serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from portalm.cli.engine_flags import add_engine_flags


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`portalm serve`: an OpenAI-compatible server on one accelerator."""
    parser = commands.add_parser("serve", help="serve a model over HTTP")
    parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any")
    parser.add_argument("--uds", default=None, help="Unix socket to listen on instead")
    parser.add_argument("--api-key", action="append", default=[], help="may be repeated")
    parser.add_argument(
        "--served-model-name", nargs="+", default=[], help="names that clients may use"
    )
    parser.add_argument(
        "--max-num-queued-reqs", type=int, default=None, help="requests that may wait; then 429"
    )
    parser.add_argument(
        "--shutdown-timeout", type=float, default=30.0, help="seconds that requests may go on"
    )
    _add_watching_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_serve)


def _add_watching_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("logs and traces")
    flags.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of every line on stderr"
    )
    flags.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least to log; info has one line for each request that ended",
    )
    flags.add_argument(
        "--enable-log-requests",
        action="store_true",
        help="log prompts and answers too (by default no content is logged)",
    )
    flags.add_argument(
        "--disable-log-stats", action="store_true", help="no line of throughput every 10 s"
    )
    flags.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send OpenTelemetry traces to this collector, over OTLP/HTTP "
        "(needs portalm[otel]), for example http://localhost:4318/v1/traces",
    )


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from portalm.cli.engine_flags import engine_settings
    from portalm.config import EngineConfig
    from portalm.logs import LogConfig
    from portalm.server.run import ServerConfig, run

    settings = engine_settings(arguments)
    if arguments.model_name is not None:
        settings["model"] = arguments.model_name
    run(
        EngineConfig.from_dict(settings),
        ServerConfig(
            host=arguments.host,
            port=arguments.port,
            uds=arguments.uds,
            served_model_names=arguments.served_model_name,
            api_keys=arguments.api_key,
            max_num_queued_reqs=arguments.max_num_queued_reqs,
            shutdown_timeout_s=arguments.shutdown_timeout,
            logs=LogConfig(format=arguments.log_format, level=arguments.log_level),
            log_requests=arguments.enable_log_requests,
            log_stats=not arguments.disable_log_stats,
            otlp_traces_endpoint=arguments.otlp_traces_endpoint,
        ),
    )
    return 0
