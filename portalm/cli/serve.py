"""`portalm serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from portalm.cli.answer_flags import add_answer_flags
from portalm.cli.engine_flags import add_engine_flags


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`portalm serve`: an OpenAI-compatible server on one accelerator."""
    parser = commands.add_parser("serve", help="serve a model over HTTP")
    parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any")
    parser.add_argument("--uds", default=None, help="Unix socket to listen on instead")
    parser.add_argument(
        "--served-model-name", nargs="+", default=[], help="names that clients may use"
    )
    parser.add_argument(
        "--shutdown-timeout", type=float, default=30.0, help="seconds that requests may go on"
    )
    _add_access_flags(parser)
    _add_load_flags(parser)
    _add_watching_flags(parser)
    add_answer_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_serve)


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("who may ask")
    flags.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="may be repeated; others on this machine can see it: --api-key-file hides it",
    )
    flags.add_argument(
        "--api-key-file", default=None, help="keys, one a line; read again on SIGHUP"
    )
    flags.add_argument(
        "--allowed-origins", nargs="+", default=[], help="web pages that may ask (CORS); * is all"
    )
    flags.add_argument("--ssl-certfile", default=None, help="certificate: serve HTTPS")
    flags.add_argument("--ssl-keyfile", default=None, help="its private key")
    flags.add_argument("--ssl-ca-certs", default=None, help="to check clients' certificates by")
    flags.add_argument(
        "--ssl-cert-reqs",
        type=int,
        default=0,
        choices=(0, 1, 2),
        help="clients need a certificate: 0 no, 1 checked if there is one, 2 yes",
    )
    flags.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring a chat_template; it is a program that may run for ever",
    )


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("load")
    flags.add_argument(
        "--max-num-queued-reqs", type=int, default=None, help="answers that may wait; then 429"
    )
    flags.add_argument(
        "--max-num-queued-tokens",
        type=int,
        default=None,
        help="prompt tokens that may wait; then 429",
    )
    flags.add_argument(
        "--queue-timeout", type=float, default=None, help="seconds to wait at most; then 503"
    )


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
    from portalm.cli.answer_flags import answer_format
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
            api_key_file=arguments.api_key_file,
            allowed_origins=arguments.allowed_origins,
            ssl_keyfile=arguments.ssl_keyfile,
            ssl_certfile=arguments.ssl_certfile,
            ssl_ca_certs=arguments.ssl_ca_certs,
            ssl_cert_reqs=arguments.ssl_cert_reqs,
            max_num_queued_reqs=arguments.max_num_queued_reqs,
            max_num_queued_tokens=arguments.max_num_queued_tokens,
            queue_timeout_s=arguments.queue_timeout,
            trust_request_chat_template=arguments.trust_request_chat_template,
            shutdown_timeout_s=arguments.shutdown_timeout,
            logs=LogConfig(format=arguments.log_format, level=arguments.log_level),
            log_requests=arguments.enable_log_requests,
            log_stats=not arguments.disable_log_stats,
            otlp_traces_endpoint=arguments.otlp_traces_endpoint,
            answer_format=answer_format(arguments),
        ),
    )
    return 0
