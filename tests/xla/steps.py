"""One attention step as plain arrays: blocks in random order, NaN in every unused slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from portalm.backend import AttentionSpec
from portalm.conformance import reference
from portalm.conformance.cases import Batch, Heads, PagedBatch

HEAD_SIZE, BLOCK_SIZE = 64, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Inputs of one step, float32 and int32, followed by `pad` padding tokens and requests."""

    batch: Batch
    spec: AttentionSpec
    query: np.ndarray  # [T, H, D]; query, key and value are NaN for padding tokens
    key: np.ndarray  # [T, H_kv, D]
    value: np.ndarray
    slots: np.ndarray  # [T]
    query_start_loc: np.ndarray  # [S + 1]
    seq_lens: np.ndarray  # [S]
    block_table: np.ndarray  # [S, MB]
    before: np.ndarray  # [NB, H_kv, B, 2 P]: the cache without this step's tokens
    after: np.ndarray  # the cache with them
    sinks: np.ndarray | None  # [H]
    contexts: list[tuple[np.ndarray, np.ndarray]]  # keys and values of each request, [N, H_kv, D]

    @property
    def num_tokens(self) -> int:
        return sum(self.batch.query_lens)

    def expected(self) -> np.ndarray:
        """Attention of the step's tokens, float64 [sum of query_lens, H, D]."""
        sinks = None if self.sinks is None else self.sinks.astype(np.float64)
        loc = self.query_start_loc
        parts = [
            reference.attention(
                self.query[loc[i] : loc[i + 1]].astype(np.float64),
                key.astype(np.float64),
                value.astype(np.float64),
                self.spec,
                sinks,
            )
            for i, (key, value) in enumerate(self.contexts)
        ]
        return np.concatenate(parts)

    def attended(self, attend: Callable[..., jax.Array], dtype: str = "float32") -> np.ndarray:
        """Result of `attend` for the step's own rows, [sum of query_lens, H, D]."""
        out = attend(
            jnp.asarray(self.query, dtype),
            jnp.asarray(self.after, dtype),
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.spec,
            max_query_len=max(self.batch.query_lens),
            sinks=self.sinks,
        )
        assert out.shape == self.query.shape
        assert out.dtype == dtype
        return np.asarray(out[: self.num_tokens], np.float32)

    def round_to(self, dtype: str) -> None:
        """Round query, cache and contexts to a smaller dtype, in place."""
        for x in (self.query, self.after, *(x for pair in self.contexts for x in pair)):
            x[:] = np.asarray(jnp.asarray(x, dtype), np.float32)


def make_step(
    batch: Batch,
    heads: Heads,
    *,
    head_size: int = HEAD_SIZE,
    block_size: int = BLOCK_SIZE,
    lanes: int | None = None,
    pad: int = 3,
    has_alibi: bool = False,
    has_sinks: bool = False,
    **spec: float,
) -> Step:
    """Make a step of random tokens for `batch`; `lanes` is P, by default the head size."""
    rng = np.random.default_rng(0)
    paged = PagedBatch(batch.seq_lens, block_size, rng)
    lanes = head_size if lanes is None else lanes
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads

    def random(length: int, count: int) -> np.ndarray:
        return rng.standard_normal((length, count, head_size), np.float32)

    contexts = [(random(n, num_kv_heads), random(n, num_kv_heads)) for n in batch.seq_lens]
    num_requests = len(batch.seq_lens)
    table = np.zeros((num_requests + pad, max(map(len, paged.tables)) + pad), np.int32)
    after = np.full((paged.num_blocks, num_kv_heads, block_size, 2 * lanes), np.nan, np.float32)
    before = after.copy()
    parts, slots = [], []
    for i, (key, value) in enumerate(contexts):
        table[i, : len(paged.tables[i])] = paged.tables[i]
        start = batch.seq_lens[i] - batch.query_lens[i]
        for place, slot in enumerate(paged.slots(i)):
            for cache in (before, after) if place < start else (after,):
                cell = cache[slot // block_size, :, slot % block_size]  # [H_kv, 2 P]
                cell[:] = 0
                cell[:, :head_size], cell[:, lanes : lanes + head_size] = key[place], value[place]
        parts.append((key[start:], value[start:]))
        slots += paged.slots(i)[start:]

    def rows(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.full((pad, *x.shape[1:]), np.nan, np.float32)])

    loc = np.concatenate([[0], np.cumsum([*batch.query_lens, *[0] * pad])])
    slopes = tuple(2.0 ** (-8 * (i + 1) / num_heads) for i in range(num_heads))
    return Step(
        batch=batch,
        spec=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            alibi_slopes=slopes if has_alibi else None,
            has_sinks=has_sinks,
            **spec,
        ),
        query=rows(2 * random(sum(batch.query_lens), num_heads)),
        key=rows(np.concatenate([key for key, _ in parts])),
        value=rows(np.concatenate([value for _, value in parts])),
        slots=np.array(slots + [0] * pad, np.int32),
        query_start_loc=loc.astype(np.int32),
        seq_lens=np.array([*batch.seq_lens, *[0] * pad], np.int32),
        block_table=table,
        before=before,
        after=after,
        sinks=2 * rng.standard_normal(num_heads, np.float32) if has_sinks else None,
        contexts=contexts,
    )
