"""Follows requests from arrival to end, and reports them to metrics and observers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import RequestMetrics, RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.server.observability.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Origin:
    """The HTTP request that a request to the engine comes from."""

    path: str
    arrival_time: float
    """Seconds since the epoch."""
    trace_headers: Mapping[str, str]
    """The headers traceparent and tracestate, if they were sent."""


_origin: ContextVar[Origin | None] = ContextVar("origin", default=None)


class RequestOrigins:
    """ASGI middleware: records the origin of requests, counts responses by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if no response is started

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        token = _origin.set(Origin(scope["path"], time.time(), headers))
        try:
            await self._app(scope, receive, note)
        finally:
            _origin.reset(token)
            # unknown paths share one label: there is no limit to their number
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count_response(route, status)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """Facts about a request after its end."""

    request_id: str
    tenant: str
    params: SamplingParams
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int | None
    """Number of prompt tokens found in the prefix cache; None if it did not finish normally."""
    finish_reasons: Sequence[str]
    """Finish reason of each answer."""
    error: str | None
    times: RequestMetrics
    origin: Origin | None
    final: RequestOutput | None
    """The request with its answers; None if it was aborted or failed."""


class RequestObserver:
    """Interface of observers, which are called for every request. Methods must not block."""

    def began(self, processed: ProcessedInput, params: SamplingParams) -> None:
        """Called before the request is sent to the engine."""

    def ended(self, record: RequestRecord) -> None:
        """Called after the request has ended."""


@dataclass(slots=True)
class RequestWatch:
    """Follows one request: updates metrics with each delta, and observers at its start and end."""

    metrics: Metrics
    observers: Sequence[RequestObserver]
    processed: ProcessedInput
    params: SamplingParams
    _arrival: float = field(init=False, default_factory=time.monotonic)
    _times: RequestMetrics = field(init=False)
    _last: dict[int, float] = field(init=False, default_factory=dict)
    _reasons: dict[int, str] = field(init=False, default_factory=dict)
    _num_generated: int = field(init=False, default=0)
    _error: str | None = field(init=False, default=None)
    _final: RequestOutput | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Record the arrival, and call the observers."""
        self._times = RequestMetrics(time.time())
        for observer in self.observers:
            observer.began(self.processed, self.params)

    def saw(self, delta: AnswerDelta) -> None:
        """Record a delta of one answer."""
        now = time.monotonic()
        self._times = delta.metrics
        if delta.token_ids:
            if not self._num_generated:
                self.metrics.observe("time_to_first_token_seconds", now - self._arrival)
                self.metrics.observe("request_queue_time_seconds", delta.metrics.queue_s)
                self.metrics.observe("request_prefill_time_seconds", delta.metrics.prefill_s)
            elif delta.index in self._last:
                gap = (now - self._last[delta.index]) / len(delta.token_ids)
                self.metrics.observe("inter_token_latency_seconds", gap)
            self._last[delta.index] = now
            self._num_generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._reasons[delta.index] = delta.finish_reason
            self._error = self._error or delta.error
            self._final = delta.final

    def failed(self, error: Exception) -> None:
        """Record the error that ended the answers which are still open."""
        self._error = str(error)

    def ended(self) -> None:
        """Record the end: answers that are still open have failed or were aborted."""
        for index in range(self.params.n):
            self._reasons.setdefault(index, "abort" if self._error is None else "error")
        e2e_s = time.monotonic() - self._arrival
        times = self._times
        if times.finished_time is None:
            times = replace(times, finished_time=times.arrival_time + e2e_s)
        record = RequestRecord(
            request_id=self.processed.request_id,
            tenant=self.processed.requests[0].tenant,
            params=self.params,
            num_prompt_tokens=len(self.processed.prompt_token_ids),
            num_generated_tokens=self._num_generated,
            num_cached_tokens=None if self._final is None else self._final.num_cached_tokens,
            finish_reasons=[self._reasons[index] for index in sorted(self._reasons)],
            error=self._error,
            times=times,
            origin=_origin.get(),
            final=self._final,
        )
        self._count(record, e2e_s)
        for observer in self.observers:
            observer.ended(record)

    def _count(self, record: RequestRecord, e2e_s: float) -> None:
        for reason in record.finish_reasons:
            self.metrics.count_end(reason)
        self.metrics.observe("e2e_request_latency_seconds", e2e_s)
        self.metrics.observe("request_decode_time_seconds", record.times.decode_s)
        self.metrics.observe("request_prompt_tokens", record.num_prompt_tokens)
        self.metrics.observe("request_generation_tokens", record.num_generated_tokens)
        self.metrics.observe("request_params_n", self.params.n)
        self.metrics.observe("request_params_max_tokens", self.params.max_tokens)
