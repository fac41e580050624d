"""Step sizes that programs are compiled for."""

from __future__ import annotations

from portalm.config import SchedulerConfig
from portalm_backends.xla.backend import XlaBackend


def test_default_limits_need_at_most_twelve_programs(backend: XlaBackend) -> None:
    limits = SchedulerConfig()

    buckets = backend.buckets(limits.max_batch_tokens, limits.max_batch_requests, 128)

    num_programs = sum(1 if bucket.max_query_len == 1 else 2 for bucket in buckets)
    assert num_programs <= 12
    assert max(b.num_tokens for b in buckets) == limits.max_batch_tokens


def test_prompt_sizes_grow_by_at_most_a_factor_of_four(
    backend: XlaBackend,
) -> None:
    sizes = sorted({b.num_tokens for b in backend.buckets(5000, 300, 8) if b.max_query_len > 1})

    assert sizes == [128, 512, 2048, 2500, 5000]
