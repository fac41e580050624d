"""A trace collector in this process, which receives and decodes OTLP over HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Span:
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool


@dataclass
class Collector:
    url: str
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    num_refused: int = 0
    is_down: bool = False
    """Whether it rejects all requests."""

    def trace_of(self, request_id: str, seconds: float = 10) -> tuple[Span, dict[str, Span]]:
        """Wait for a request's span; returns it with its child spans by name."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for span in self.spans:
                if span.attributes.get("gen_ai.request.id") == request_id:
                    children = [one for one in self.spans if one.parent_id == span.span_id]
                    return span, {one.name: one for one in children}
            time.sleep(0.02)
        raise AssertionError(f"no trace of {request_id} among {self.spans}")

    def receive(self, body: bytes) -> None:
        """Decode the spans of a request."""
        self.bodies.append(body)
        message = ExportTraceServiceRequest.FromString(body)
        found = []
        for resource_spans in message.resource_spans:
            self.resources.append(_attributes(resource_spans.resource.attributes))
            for scope_spans in resource_spans.scope_spans:
                found += [_span(one) for one in scope_spans.spans]
        self.spans += found  # the whole batch at once, so that a span is never without its children


def _span(one: Any) -> Span:
    return Span(
        name=one.name,
        kind=one.SpanKind.Name(one.kind).removeprefix("SPAN_KIND_"),
        trace_id=one.trace_id.hex(),
        span_id=one.span_id.hex(),
        parent_id=one.parent_span_id.hex(),
        start_ns=one.start_time_unix_nano,
        end_ns=one.end_time_unix_nano,
        attributes=_attributes(one.attributes),
        is_error=one.status.code == one.status.STATUS_CODE_ERROR,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_accepted = (
                not collector.is_down
                and self.path == "/v1/traces"
                and self.headers["Content-Type"] == "application/x-protobuf"
            )
            if is_accepted:
                collector.receive(body)
            else:
                collector.num_refused += 1
            self.send_response(200 if is_accepted else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
