"""OpenTelemetry traces: a span per request, with child spans for queue, prefill and decode.

Imported only if traces are configured: OpenTelemetry's SDK and exporter are an extra.

Attributes follow OpenTelemetry's semantic conventions for generative AI, and vLLM's
gen_ai.latency.*.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from portalm import __version__
from portalm.errors import ConfigError
from portalm.server.observability.watch import RequestObserver, RequestRecord

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AttributeValue
except ImportError as error:
    raise ConfigError(
        f"--otlp-traces-endpoint needs OpenTelemetry, which is not installed ({error}): "
        f"pip install 'portalm[otel]'"
    ) from error

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
"""Timeout of sending a batch of spans, retries included."""

_RETRY_AFTER_S = 30.0
"""Time after a failed batch during which spans are dropped without trying to send them."""

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
"""gen_ai.operation.name by path of the request."""


class Tracer(RequestObserver):
    """Creates a span for every ended request; another thread sends them."""

    def __init__(self, endpoint: str, model: str) -> None:
        """Start a tracer.

        OpenTelemetry's environment variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
        OTEL_EXPORTER_OTLP_HEADERS, ...) apply.

        Args:
            endpoint: URL of a collector; without a path, /v1/traces is added.
            model: name of the model, an attribute of every span.

        Raises:
            ConfigError: `endpoint` is not an http or https URL.
        """
        self._model = model
        self._exporter = _QuietExporter(_traces_url(endpoint))
        # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME take precedence over these
        ours = Resource({"service.name": "portalm", "service.version": __version__})
        given = Resource.create()
        if str(given.attributes["service.name"]).startswith("unknown_service"):
            resource = given.merge(ours)
        else:
            resource = ours.merge(given)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("portalm", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: RequestRecord) -> None:
        """Create the span of a request, inside the trace that its headers name, if any."""
        origin, times = record.origin, record.times
        assert times.finished_time is not None
        operation = _OPERATIONS.get("" if origin is None else origin.path, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract({} if origin is None else origin.trace_headers),
            kind=SpanKind.SERVER,
            start_time=_ns(times.arrival_time if origin is None else origin.arrival_time),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": self._model,
                **_attributes(record),
            },
        )
        if span.is_recording():
            within = set_span_in_context(span)
            for name, start, end in _phases(record):
                phase = self._tracer.start_span(name, context=within, start_time=_ns(start))
                phase.end(_ns(end))
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(_ns(times.finished_time))

    def close(self) -> None:
        """Send the remaining spans; an unreachable collector is not waited for again."""
        self._exporter.is_closing = True
        self._provider.shutdown()


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of the phases that the request reached."""
    times = record.times
    starts = (
        ("queue", times.arrival_time),
        ("prefill", times.first_scheduled_time),
        ("decode", times.first_token_time),
    )
    reached = [(name, start) for name, start in starts if start is not None]
    ends = [*(start for _, start in reached[1:]), times.finished_time]
    for (name, start), end in zip(reached, ends, strict=True):
        assert end is not None
        yield name, start, end


def _attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    """Attributes of a request's span; they contain no prompt or answer."""
    params, times = record.params, record.times
    values: dict[str, AttributeValue | None] = {
        "gen_ai.provider.name": "portalm",
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.response.finish_reasons": list(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "gen_ai.latency.time_in_queue": times.queue_s,
        "gen_ai.latency.time_to_first_token": times.time_to_first_token_s,
        "gen_ai.latency.time_in_model_prefill": times.prefill_s,
        "gen_ai.latency.time_in_model_decode": times.decode_s,
        "gen_ai.latency.e2e": times.e2e_s,
        "url.path": None if record.origin is None else record.origin.path,
        "portalm.tenant": record.tenant or None,
        "error.type": None if record.error is None else "error",
    }
    return {name: value for name, value in values.items() if value is not None}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint must be an http or https URL, not {endpoint!r}: traces are "
            f"sent over OTLP/HTTP, for which collectors listen on port 4318 "
            f"(http://HOST:4318/v1/traces)"
        )
    return endpoint if parts.path not in ("", "/") else f"{endpoint.rstrip('/')}/v1/traces"


class _QuietExporter(SpanExporter):
    """Sends spans; logs one warning when the collector becomes unreachable, one when it is back."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
        self._num_lost = 0
        self._retry_time = 0.0
        self.is_closing = False
        # it would log an error for every batch
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch of spans; called in the batch processor's thread."""
        if self._num_lost and (self.is_closing or time.monotonic() < self._retry_time):
            self._num_lost += len(spans)
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._num_lost:
                logger.warning(
                    "traces cannot be sent to %s: they are dropped until it responds",
                    self._endpoint,
                )
            self._num_lost += len(spans)
            self._retry_time = time.monotonic() + _RETRY_AFTER_S
        elif self._num_lost:
            logger.warning("traces can be sent again; %d spans were lost", self._num_lost)
            self._num_lost = 0
        return result

    def shutdown(self) -> None:
        """Close the exporter; no spans follow."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
