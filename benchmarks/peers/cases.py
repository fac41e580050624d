"""The measured cases: the requests of each column, and the figure computed from their answers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peers.base import Answer

Figure = Literal["decode", "ttft", "throughput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One column."""

    name: str
    title: str
    figure: Figure
    num_requests: int
    num_in: int
    num_out: int
    concurrency: int = 1
    shared_prefix: int = 0
    """Tokens of num_in that all requests share as a prefix."""

    def prompts(self, words: Sequence[int], seed: int) -> list[list[int]]:
        """Return prompts that share only the prefix, among themselves and across seeds."""
        rng = random.Random(f"{self.name} {seed}")
        prefix = rng.choices(words, k=self.shared_prefix)
        num_own = self.num_in - self.shared_prefix
        return [prefix + rng.choices(words, k=num_own) for _ in range(self.num_requests)]

    def value(self, answers: Sequence[Answer]) -> float:
        """Compute the figure: tokens per second, or seconds for ttft."""
        if self.figure == "decode":
            return statistics.median(
                (one.num_tokens - one.num_first) / (one.last - one.first) for one in answers
            )
        if self.figure == "ttft":
            return statistics.median(one.first - one.sent for one in answers)
        wall = max(one.last for one in answers) - min(one.sent for one in answers)
        return sum(one.num_tokens for one in answers) / wall

    def shortened(self) -> Case:
        """Return a smaller case of the same shape, for a quick check."""
        return replace(
            self,
            num_requests=min(self.num_requests, max(self.concurrency, 2)),
            num_out=min(self.num_out, 16),
        )


CASES = (
    Case(
        name="decode",
        title="1 stream, decode (tok/s)",
        figure="decode",
        num_requests=1,
        num_in=512,
        num_out=128,
    ),
    Case(
        name="ttft",
        title="TTFT, 512-token prompt (ms)",
        figure="ttft",
        num_requests=3,
        num_in=512,
        num_out=1,
    ),
    Case(
        name="one",
        title="1 at a time (tok/s)",
        figure="throughput",
        num_requests=8,  # more requests would only take longer, since they share nothing
        num_in=128,
        num_out=64,
    ),
    Case(
        name="eight",
        title="8 at a time (tok/s)",
        figure="throughput",
        num_requests=32,
        num_in=128,
        num_out=64,
        concurrency=8,
    ),
    Case(
        name="all",
        title="32 at a time (tok/s)",
        figure="throughput",
        num_requests=32,
        num_in=128,
        num_out=64,
        concurrency=32,
    ),
    Case(
        name="prefix",
        title="16 sharing a 512 prefix (tok/s)",
        figure="throughput",
        num_requests=16,
        num_in=544,
        num_out=32,
        concurrency=16,
        shared_prefix=512,
    ),
)
