"""The request log: a line for each ended request, and the throughput every ten seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from portalm.engine.client import EngineClient
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.messages import EngineStats
from portalm.logs import with_fields
from portalm.sampling_params import SamplingParams
from portalm.server.observability.watch import RequestObserver, RequestRecord

logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0

_MAX_CONTENT = 4000
"""Maximum length of a prompt or an answer in a line, in characters."""


@dataclass(frozen=True, slots=True)
class RequestLog(RequestObserver):
    """Logs one line when a request ends; prompts and answers only if `with_content`."""

    with_content: bool = False

    def began(self, processed: ProcessedInput, params: SamplingParams) -> None:
        """With content: log the prompt and the sampling parameters."""
        if self.with_content:
            prompt = processed.prompt
            fields = with_fields(
                id=processed.request_id,
                prompt=_shown(str(processed.prompt_token_ids) if prompt is None else prompt),
                params=str(params),
            )
            logger.info("request began", extra=fields)

    def ended(self, record: RequestRecord) -> None:
        """Log the tenant, token counts, finish reasons and times."""
        times = record.times
        fields = with_fields(
            id=record.request_id,
            path=None if record.origin is None else record.origin.path,
            tenant=record.tenant or None,
            prompt_tokens=record.num_prompt_tokens,
            cached_tokens=record.num_cached_tokens,
            generated_tokens=record.num_generated_tokens,
            finish_reason=",".join(record.finish_reasons),
            queue_s=times.queue_s,
            ttft_s=times.time_to_first_token_s,
            total_s=times.e2e_s,
            error=record.error,
        )
        if self.with_content and record.final is not None:
            fields["fields"]["answers"] = [_shown(one.text) for one in record.final.outputs]
        level = logging.INFO if record.error is None else logging.WARNING
        logger.log(level, "request ended", extra=fields)


def _shown(text: str) -> str:
    """`text`, cut at the maximum length with a note on how much is missing."""
    if len(text) <= _MAX_CONTENT:
        return text
    return f"{text[:_MAX_CONTENT]}… ({len(text) - _MAX_CONTENT} more characters)"


async def log_throughput(client: EngineClient, *, interval_s: float = _INTERVAL_S) -> None:
    """Log a line every `interval_s` while there is traffic, and one after it. Never returns."""
    before, then = client.stats, time.monotonic()
    was_busy = False
    while True:
        await asyncio.sleep(interval_s)
        stats, now = client.stats, time.monotonic()
        is_busy = stats.num_running + stats.num_waiting > 0
        if is_busy or was_busy or stats.steps_total > before.steps_total:
            fields = throughput(before, stats, seconds=now - then)
            logger.info("throughput", extra=with_fields(**fields))
        before, then, was_busy = stats, now, is_busy


def throughput(
    before: EngineStats, after: EngineStats, *, seconds: float
) -> dict[str, int | float | None]:
    """Throughput between two readings of the engine's counters, and its load at the second."""
    queries = after.prefix_queries_total - before.prefix_queries_total
    hits = after.prefix_hits_total - before.prefix_hits_total
    return {
        "running": after.num_running,
        "waiting": after.num_waiting,
        "kv_used": after.kv_used,
        "prompt_tokens_per_s": (after.prompt_tokens_total - before.prompt_tokens_total) / seconds,
        "generated_tokens_per_s": (after.generation_tokens_total - before.generation_tokens_total)
        / seconds,
        "prefix_hit_rate": hits / queries if queries else None,
        "preemptions": after.preemptions_total - before.preemptions_total,
    }
