"""Prometheus counters, gauges and histograms, under portalm: and vllm:."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from portalm.engine.client import EngineClient

PREFIXES = ("portalm:", "vllm:")
"""PortaLM's own prefix, and vLLM's for existing dashboards."""

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
_PART_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ANSWERS = (1, 2, 5, 10, 20)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Seconds between tokens of an answer.", _GAP_S),
    "e2e_request_latency_seconds": ("Seconds from arrival to the end.", _WHOLE_S),
    "request_queue_time_seconds": ("Seconds from arrival to the first step.", _PART_S),
    "request_prefill_time_seconds": ("Seconds from the first step to the first token.", _PART_S),
    "request_decode_time_seconds": ("Seconds from the first token to the end.", _PART_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
    "request_params_n": ("Answers that a request asked for.", _ANSWERS),
    "request_params_max_tokens": ("max_tokens of requests that gave one.", _TOKENS),
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
    """Metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient, model: str) -> None:
        """Create the metrics. Values of the engine are read when the metrics are scraped."""
        self.registry = CollectorRegistry()
        """All metrics under all prefixes."""
        self._model = model
        plain = CollectorRegistry()
        self._histograms: dict[str, Any] = {
            name: Histogram(name, text, ["model_name"], registry=plain, buckets=buckets).labels(
                model
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=plain,
        )
        self._responses = Counter(
            "http_requests",
            "HTTP requests by endpoint and status.",
            ["model_name", "handler", "status"],
            registry=plain,
        )
        plain.register(_EngineCollector(client, model))
        self.registry.register(_Prefixed(plain))

    def observe(self, name: str, value: float | None) -> None:
        """Add a value to a histogram; None is ignored."""
        if value is not None:
            self._histograms[name].observe(value)

    def count_end(self, reason: str) -> None:
        """Count an ended answer by its finish reason."""
        self._success.labels(self._model, reason).inc()

    def count_response(self, handler: str, status: int) -> None:
        """Count an HTTP response by the endpoint's path template and the status."""
        self._responses.labels(self._model, handler, str(status)).inc()


class _Prefixed(Collector):
    """Exports the metrics of another registry under each prefix."""

    def __init__(self, plain: CollectorRegistry) -> None:
        self._plain = plain

    def collect(self) -> Iterator[Metric]:
        found = list(self._plain.collect())
        for prefix in PREFIXES:
            for metric in found:
                copy = Metric(prefix + metric.name, metric.documentation, metric.type)
                copy.samples = [
                    sample._replace(name=prefix + sample.name)
                    for sample in metric.samples
                    if not sample.name.endswith(
                        "_created"
                    )  # creation times of series are not exported
                ]
                yield copy

    def describe(self) -> list[Metric]:
        """No description in advance: metrics are known when they are collected."""
        return []


class _EngineCollector(Collector):
    """Exports the engine's statistics as of its last step."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        for name, (text, attribute) in _GAUGES.items():
            yield self._gauge(name, text, getattr(stats, attribute))
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.", stats.kv_used)
        yield self._gauge(
            "engine_ready", "1 while an engine takes requests.", int(self._client.is_alive)
        )
        for name, (text, attribute) in _COUNTERS.items():
            yield self._counter(name, text, getattr(stats, attribute))
        yield self._counter(
            "engine_restarts", "Engines started after one ended.", self._client.num_restarts
        )
        yield _step_tokens(self._client.steps_by_tokens, self._model)
        yield from self._startup_metrics()

    def _startup_metrics(self) -> Iterator[Metric]:
        """Metrics that exist once the model is loaded."""
        ready, config = self._client.ready, self._client.config
        if ready is None:
            return
        startup = GaugeMetricFamily(
            "startup_seconds", "Seconds that starting took.", labels=["model_name", "phase"]
        )
        for phase, seconds in ready.startup_s.items():
            startup.add_metric([self._model, phase], seconds)
        yield startup
        settings = {
            "model_name": self._model,
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
        }
        info = GaugeMetricFamily(
            "cache_config_info", "Settings of the KV cache, as labels.", labels=list(settings)
        )
        info.add_metric(list(settings.values()), 1)
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([self._model], value)
        return counter


def _step_tokens(steps_by_tokens: Counts[int], model: str) -> Metric:
    """Histogram of the number of tokens computed in a step."""
    in_buckets = [0] * (len(_STEP_TOKENS) + 1)
    for num_tokens, num_steps in steps_by_tokens.items():
        in_buckets[bisect.bisect_left(_STEP_TOKENS, num_tokens)] += num_steps
    bounds = [*(str(float(bound)) for bound in _STEP_TOKENS), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(in_buckets), strict=True))
    histogram = HistogramMetricFamily(
        "iteration_tokens_total", "Tokens computed in a step.", labels=["model_name"]
    )
    total = sum(tokens * steps for tokens, steps in steps_by_tokens.items())
    histogram.add_metric([model], buckets, total)
    return histogram
