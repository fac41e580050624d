"""/metrics: Prometheus counters, gauges and histograms, under portalm: and vllm:."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from portalm.engine.client import EngineClient
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.sampling_params import SamplingParams

PREFIXES = ("portalm:", "vllm:")
"""Our own, and the one that existing dashboards read."""

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Seconds between tokens of an answer.", _GAP_S),
    "e2e_request_latency_seconds": ("Seconds from arrival to the end.", _WHOLE_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
}

_GAUGES = {
    "num_requests_running": ("Requests that hold KV blocks.", "num_running"),
    "num_requests_waiting": ("Requests in the queue.", "num_waiting"),
    "kv_blocks_used": ("KV blocks held by running requests.", "num_used_blocks"),
    "kv_blocks_cached": ("KV blocks kept for a prefix hit.", "num_cached_blocks"),
    "kv_waste_perc": ("Share of held slots that no token uses, last blocks aside.", "kv_waste"),
}

_COUNTERS = {
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        "prefix_queries_total",
    ),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hits_total"),
    "num_preemptions": ("Times a running request lost its blocks.", "preemptions_total"),
    "prompt_tokens": ("Prompt tokens computed.", "prompt_tokens_total"),
    "generation_tokens": ("Tokens generated.", "generation_tokens_total"),
    "engine_steps": ("Steps of the engine.", "steps_total"),
}


class Metrics:
    """One server's metrics in a registry of their own."""

    def __init__(self, client: EngineClient, model: str) -> None:
        """Gauges and counters of the engine are read when scraped."""
        self.registry = CollectorRegistry()
        self._model = model
        self.registry.register(_EngineCollector(client, model))
        self._histograms: dict[str, list[Any]] = {name: [] for name in _HISTOGRAMS}
        self._success: list[Any] = []
        for prefix in PREFIXES:
            for name, (text, buckets) in _HISTOGRAMS.items():
                histogram = Histogram(
                    prefix + name, text, ["model_name"], registry=self.registry, buckets=buckets
                )
                self._histograms[name].append(histogram.labels(model))
            self._success.append(
                Counter(
                    prefix + "request_success",
                    "Requests by how they ended.",
                    ["model_name", "finished_reason"],
                    registry=self.registry,
                )
            )

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram."""
        for histogram in self._histograms[name]:
            histogram.observe(value)

    def count_end(self, reason: str) -> None:
        """One more answer ended."""
        for counter in self._success:
            counter.labels(self._model, reason).inc()

    def watch(self, processed: ProcessedInput, params: SamplingParams) -> RequestWatch:
        """Times of one request."""
        return RequestWatch(self, processed, params)


class RequestWatch:
    """Notes when a request's tokens come."""

    def __init__(self, metrics: Metrics, processed: ProcessedInput, params: SamplingParams) -> None:
        """The request arrives now."""
        self._metrics = metrics
        self._num_prompt = len(processed.prompt_token_ids)
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}
        self._num_generated = 0
        self._num_open = params.n
        self._is_first = True

    def saw(self, delta: AnswerDelta) -> None:
        """Tokens of one answer came."""
        now = time.monotonic()
        if delta.token_ids:
            if self._is_first:
                self._metrics.observe("time_to_first_token_seconds", now - self._arrival)
                self._is_first = False
            elif delta.index in self._last:
                gap = (now - self._last[delta.index]) / len(delta.token_ids)
                self._metrics.observe("inter_token_latency_seconds", gap)
            self._last[delta.index] = now
            self._num_generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._metrics.count_end(delta.finish_reason)

    def ended(self) -> None:
        """No more will come: what did not end by itself was aborted."""
        for _ in range(self._num_open):
            self._metrics.count_end("abort")
        self._metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._arrival)
        self._metrics.observe("request_prompt_tokens", self._num_prompt)
        self._metrics.observe("request_generation_tokens", self._num_generated)


class _EngineCollector(Collector):
    """The engine's own figures, as of its last step."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        for prefix in PREFIXES:
            for name, (text, attribute) in _GAUGES.items():
                yield self._gauge(prefix + name, text, getattr(stats, attribute))
            used = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
            yield self._gauge(
                prefix + "kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.", used
            )
            for name, (text, attribute) in _COUNTERS.items():
                counter = CounterMetricFamily(prefix + name, text, labels=["model_name"])
                counter.add_metric([self._model], getattr(stats, attribute))
                yield counter
            restarts = CounterMetricFamily(
                prefix + "engine_restarts",
                "Engines started after one ended.",
                labels=["model_name"],
            )
            restarts.add_metric([self._model], self._client.num_restarts)
            yield restarts
            ready = self._client.ready
            if ready is not None:
                startup = GaugeMetricFamily(
                    prefix + "startup_seconds",
                    "Seconds that starting took.",
                    labels=["model_name", "phase"],
                )
                for phase, seconds in ready.startup_s.items():
                    startup.add_metric([self._model, phase], seconds)
                yield startup

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge


router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    registry = request.app.state.portalm.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
