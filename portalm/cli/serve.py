"""`portalm serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from portalm.cli.answer_flags import add_answer_flags
from portalm.cli.engine_flags import add_engine_flags


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm serve`: an OpenAI-compatible server on one accelerator."""
    parser = commands.add_parser("serve", help="serve a model over HTTP")
    parser.add_argument(
        "model_name",
        nargs="?",
        metavar="MODEL",
        help="the same as --model (default: that of --model)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0: any free port"
    )
    parser.add_argument(
        "--uds",
        metavar="PATH",
        default=None,
        help="Unix socket to listen on instead of --host and --port (default: none)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        help="model names that requests may use (default: the value of --model)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        help="seconds that running requests may take to finish at shutdown",
    )
    _add_access_flags(parser)
    _add_load_flags(parser)
    _add_watching_flags(parser)
    add_answer_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_serve)


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("access")
    flags.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="key that requests must send; may be repeated; other users of this machine can see it "
        "in the process list, --api-key-file avoids that (default: none, no key is needed)",
    )
    flags.add_argument(
        "--api-key-file",
        metavar="FILE",
        default=None,
        help="file of API keys, one per line; reread on SIGHUP (default: none)",
    )
    flags.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        help="origins of web pages that may send requests (CORS); * allows all (default: none)",
    )
    flags.add_argument(
        "--ssl-certfile",
        metavar="FILE",
        default=None,
        help="certificate to serve HTTPS with (default: none, serve HTTP)",
    )
    flags.add_argument(
        "--ssl-keyfile",
        metavar="FILE",
        default=None,
        help="private key of --ssl-certfile (default: the key in that file)",
    )
    flags.add_argument(
        "--ssl-ca-certs",
        metavar="FILE",
        default=None,
        help="CA certificates to verify clients' certificates with (default: none)",
    )
    flags.add_argument(
        "--ssl-cert-reqs",
        type=int,
        default=0,
        choices=(0, 1, 2),
        help="whether clients need a certificate: 0 no, 1 verify it if one is sent, 2 yes",
    )
    flags.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="accept a chat_template in requests; a template is a program that may run forever",
    )


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("queue limits")
    flags.add_argument(
        "--max-num-queued-reqs",
        type=int,
        default=None,
        help="maximum number of waiting answers; further requests get status 429 "
        "(default: no limit)",
    )
    flags.add_argument(
        "--max-num-queued-tokens",
        type=int,
        default=None,
        help="maximum number of waiting prompt tokens; further requests get status 429 "
        "(default: no limit)",
    )
    flags.add_argument(
        "--queue-timeout",
        type=float,
        default=None,
        help="seconds that a request may wait before it gets status 503 (default: no limit)",
    )


def _add_watching_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("logs and traces")
    flags.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of log lines on stderr",
    )
    flags.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="lowest level to log; info logs one line per finished request",
    )
    flags.add_argument(
        "--enable-log-requests",
        action="store_true",
        help="also log prompts and answers",
    )
    flags.add_argument(
        "--disable-log-stats", action="store_true", help="do not log throughput every 10 s"
    )
    flags.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="collector to send OpenTelemetry traces to over OTLP/HTTP, for example "
        "http://localhost:4318/v1/traces; needs portalm[otel] (default: none)",
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
