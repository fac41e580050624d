"""Lengths of requests, as in a well-known set of conversations."""

from __future__ import annotations

import random

FP8_ROWS = ((128, 128, 1024), (1000, 1000, 512), (2048, 128, 256), (2048, 2048, 256))
"""(prompt tokens, answer tokens, requests) of the rows that are published for float8 weights and
caches; fewer requests where they take longer."""


def lengths_like_sharegpt(count: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens; 1,000 pairs have 215,196 and 198,001 in total."""
    rng = random.Random(0)
    pairs = [
        (
            min(1024, 4 + int(rng.lognormvariate(4.6, 1.3))),
            min(1024, 4 + int(rng.lognormvariate(4.9, 1.1))),
        )
        for _ in range(count)
    ]
    for side, total in ((0, 215_196 * count // 1000), (1, 198_001 * count // 1000)):
        scale = total / sum(pair[side] for pair in pairs)
        scaled = [max(1, round(pair[side] * scale)) for pair in pairs]
        for i in range(abs(total - sum(scaled))):  # distribute the rounding error
            step = 1 if total > sum(scaled) else -1
            place = i % count
            scaled[place] = max(1, scaled[place] + step)
        pairs = [
            (s, pair[1]) if side == 0 else (pair[0], s)
            for s, pair in zip(scaled, pairs, strict=True)
        ]
    return pairs
