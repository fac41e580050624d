"""Named batches and head layouts, in shuffled KV blocks with NaN in every unused slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portalm.backend import KV, SCALED_KV_DTYPES, AttentionSpec, Bucket, KVSpec, StepMeta
from portalm.conformance.base import CheckFailed
from portalm.conformance.numerics import FloatArray, rounded
from portalm.conformance.subject import Subject

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens and context length of each request; those with one new token come first."""

    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]


BATCHES = (
    Batch("prefill", (17,), (17,)),
    Batch("decode", (1, 1, 1), (5, 16, 33)),
    Batch("chunked prefill", (8,), (40,)),
    Batch("mixed", (1, 1, 24, 9), (129, 24, 24, 30)),
    Batch("exactly one block", (16,), (16,)),
    Batch("one token", (1,), (1,)),
    Batch("long context", (1, 3), (311, 290)),
    Batch("ragged", (1, 1, 1, 2, 31, 7), (1, 17, 64, 2, 31, 71)),
)
"""Lengths around multiples of common block sizes, and every kind of step."""


def batch_named(name: str) -> Batch:
    """Return the batch named `name`."""
    return next(b for b in BATCHES if b.name == name)


@dataclass(frozen=True, slots=True)
class Heads:
    """A head layout."""

    name: str
    num_heads: int
    num_kv_heads: int


HEADS = (Heads("mha", 4, 4), Heads("gqa", 8, 2), Heads("gqa of 3", 9, 3), Heads("mqa", 8, 1))


@dataclass(frozen=True, slots=True)
class Pad:
    """Padding of a step; a backend of static shapes pads to a bucket in addition."""

    num_tokens: int = 0
    num_requests: int = 0
    num_blocks: int = 0


NO_PAD = Pad()
PAD = Pad(num_tokens=5, num_requests=3, num_blocks=2)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one request, computed in one step."""

    table: Sequence[int]
    """Physical block of each logical block."""
    start: int
    end: int


class PagedBatch:
    """Block tables of a batch: shuffled physical blocks with unallocated ones between them."""

    def __init__(self, seq_lens: Sequence[int], block_size: int, rng: np.random.Generator) -> None:
        """Assign random blocks to `seq_lens` tokens; block 0 is the null block."""
        self.seq_lens = tuple(seq_lens)
        self.block_size = block_size
        needed = [-(-length // block_size) for length in seq_lens]
        self.num_blocks = 1 + sum(needed) + 4
        free = iter((1 + rng.permutation(self.num_blocks - 1)).tolist())
        self.tables = [[next(free) for _ in range(count)] for count in needed]

    def chunks(self, query_lens: Sequence[int]) -> list[Chunk]:
        """Return the last `query_lens` tokens of each request as chunks."""
        return [
            Chunk(table, length - count, length)
            for table, length, count in zip(self.tables, self.seq_lens, query_lens, strict=True)
        ]

    def before(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return all tokens before `chunks`, in an order that a step may have."""
        rest = [Chunk(c.table, 0, c.start) for c in chunks if c.start]
        return sorted(rest, key=lambda c: c.end != 1)

    def slots(self, request: int) -> list[int]:
        """Return the slot of each token of a request."""
        table = self.tables[request]
        size = self.block_size
        return [table[i // size] * size + i % size for i in range(self.seq_lens[request])]


@dataclass(frozen=True, slots=True)
class Padded:
    """Sizes of a step's tensors."""

    num_tokens: int
    num_requests: int
    num_blocks: int
    bucket: Bucket | None


def padded_shape(
    subject: Subject, chunks: Sequence[Chunk], block_size: int, pad: Pad = NO_PAD
) -> Padded:
    """Return the size of a step: its own with `pad`, or of the smallest bucket that fits.

    If no bucket fits, the step stays as it is; with static shapes that is a failure.
    """
    num_tokens = sum(c.end - c.start for c in chunks) + pad.num_tokens
    num_requests = len(chunks) + pad.num_requests
    num_blocks = max(-(-c.end // block_size) for c in chunks) + pad.num_blocks
    longest = max(c.end - c.start for c in chunks)
    if subject.buckets is None:
        return Padded(num_tokens, num_requests, num_blocks, None)
    holding = (
        b
        for b in subject.buckets
        if b.num_tokens >= num_tokens
        and b.num_requests >= num_requests
        and b.num_blocks >= num_blocks
        and b.max_query_len >= longest
    )
    bucket = next(holding, None)
    if bucket is None:
        if subject.claims.static_shapes:
            raise CheckFailed(f"no bucket fits {num_tokens} tokens of {num_requests} requests")
        return Padded(num_tokens, num_requests, num_blocks, None)
    return Padded(bucket.num_tokens, bucket.num_requests, bucket.num_blocks, bucket)


def step_meta(
    subject: Subject,
    chunks: Sequence[Chunk],
    block_size: int,
    specs: Sequence[AttentionSpec],
    pad: Pad = NO_PAD,
) -> StepMeta:
    """Return the prepared meta of a step over `chunks`, with logits of each last token."""
    shape = padded_shape(subject, chunks, block_size, pad)
    lengths = [c.end - c.start for c in chunks]
    assert sorted(lengths, key=lambda n: n != 1) == lengths, "decodes come first"
    positions = np.zeros(shape.num_tokens, np.int32)
    slots = np.zeros(shape.num_tokens, np.int32)
    loc = np.full(shape.num_requests + 1, sum(lengths), np.int32)
    seq_lens = np.zeros(shape.num_requests, np.int32)
    tables = np.zeros((shape.num_requests, shape.num_blocks), np.int32)
    rows = np.zeros(shape.num_requests, np.int32)
    token = 0
    for i, chunk in enumerate(chunks):
        loc[i], seq_lens[i] = token, chunk.end
        num_blocks = -(-chunk.end // block_size)
        tables[i, :num_blocks] = chunk.table[:num_blocks]
        for position in range(chunk.start, chunk.end):
            positions[token] = position
            block = chunk.table[position // block_size]
            slots[token] = block * block_size + position % block_size
            token += 1
        rows[i] = token - 1
    meta = StepMeta(
        positions=subject.index(positions),
        slot_mapping=subject.index(slots),
        query_start_loc=subject.index(loc),
        seq_lens=subject.index(seq_lens),
        block_table=subject.index(tables),
        logits_rows=subject.index(rows),
        host_query_start_loc=loc,
        host_seq_lens=seq_lens,
        num_decodes=lengths.count(1),
        max_query_len=max(lengths),
        max_seq_len=max(c.end for c in chunks),
        bucket=shape.bucket,
    )
    return subject.backend.prepare(meta, specs)


def pad_rows(x: FloatArray, num_rows: int) -> F32:
    """Append rows of NaN up to `num_rows`: the values of pad tokens must not matter."""
    out = np.full((num_rows, *x.shape[1:]), np.nan, np.float32)
    out[: len(x)] = x
    return out


# -- attention --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Random queries, keys and values of a batch, rounded to the dtypes on the device."""

    batch: Batch
    spec: AttentionSpec
    dtype: str
    kv_spec: KVSpec
    query: list[F32]
    """Queries of each request, [Q, H, D]."""
    key: list[F32]
    """Keys of each request's whole context, [N, H_kv, D]."""
    value: list[F32]
    """Values likewise; [N, H_kv, value_size] where they are part of their keys."""
    sinks: F32 | None = None
    """[H], or None without sinks."""


def attention_problem(
    subject: Subject,
    batch: Batch,
    heads: Heads,
    dtype: str,
    *,
    seed: int = 0,
    head_size: int | None = None,
    block_size: int | None = None,
    kv_dtype: str | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    has_alibi: bool = False,
    has_sinks: bool = False,
    value_size: int | None = None,
    spread: float = 2.0,
) -> AttentionProblem:
    """Create a problem whose scores have a standard deviation of `spread`.

    Keys and values are rounded to `dtype`, then to the cache's dtype. 8-bit codes are not applied:
    `AttentionRun.held` reads back the values that the cache holds.
    """
    size = subject.head_size if head_size is None else head_size
    slopes = tuple(2.0 ** (-8 * (i + 1) / heads.num_heads) for i in range(heads.num_heads))
    spec = AttentionSpec(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_size=size,
        scale=size**-0.5,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        alibi_slopes=slopes if has_alibi else None,
        has_sinks=has_sinks,
        value_size=value_size,
    )
    kv_spec = KVSpec(
        num_layers=3,
        num_kv_heads=heads.num_kv_heads,
        head_size=size,
        block_size=subject.block_size if block_size is None else block_size,
        dtype=subject.kv_dtype(dtype) if kv_dtype is None else kv_dtype,
        shares_values=value_size is not None,
    )
    rng = np.random.default_rng(seed)

    def random(length: int, num_heads: int) -> F32:
        return rng.standard_normal((length, num_heads, size), np.float32)

    def stored(x: F32) -> F32:
        x = rounded(x, dtype)
        return x if kv_spec.dtype in SCALED_KV_DTYPES else rounded(x, kv_spec.dtype)

    query = [rounded(spread * random(n, heads.num_heads), dtype) for n in batch.query_lens]
    key = [stored(random(n, heads.num_kv_heads)) for n in batch.seq_lens]
    value = [stored(random(n, heads.num_kv_heads)) for n in batch.seq_lens]
    return AttentionProblem(
        batch=batch,
        spec=spec,
        dtype=dtype,
        kv_spec=kv_spec,
        query=query,
        key=key,
        value=value if value_size is None else [one[..., :value_size] for one in key],
        sinks=spread * rng.standard_normal(heads.num_heads, np.float32) if has_sinks else None,
    )


class AttentionRun:
    """Runs a problem on the device, step by step, in a cache that starts as NaN."""

    LAYER = 1
    """The layer that is used; the layers around it stay NaN."""

    def __init__(
        self, subject: Subject, problem: AttentionProblem, *, layout_seed: int = 1
    ) -> None:
        """Allocate a cache of NaN, with blocks assigned by `layout_seed`."""
        self.subject = subject
        self.problem = problem
        rng = np.random.default_rng(layout_seed)
        self.paged = PagedBatch(problem.batch.seq_lens, problem.kv_spec.block_size, rng)
        self.kv: KV = subject.nan_cache(problem.kv_spec, self.paged.num_blocks)

    def fill_context(self) -> None:
        """Write all tokens before the batch's queries."""
        chunks = self.paged.before(self.paged.chunks(self.problem.batch.query_lens))
        if chunks:
            self.write(chunks, self.meta(chunks))

    def meta(self, chunks: Sequence[Chunk], pad: Pad = NO_PAD) -> StepMeta:
        """Return the prepared meta of a step over `chunks`."""
        spec = self.problem.spec
        specs = [spec] * self.problem.kv_spec.num_layers
        return step_meta(self.subject, chunks, self.paged.block_size, specs, pad)

    def write(self, chunks: Sequence[Chunk], meta: StepMeta) -> None:
        """Write keys and values of `chunks` to the cache; pad tokens hold NaN."""
        problem = self.problem
        is_shared = problem.kv_spec.shares_values
        key, value = (
            self.subject.put(self._rows(chunks, of, len(meta.positions)), problem.dtype)
            for of in (problem.key, problem.key if is_shared else problem.value)
        )
        self.kv = self.subject.backend.kv_write(self.kv, self.LAYER, key, value, meta)

    def attend(self, chunks: Sequence[Chunk], pad: Pad = NO_PAD) -> list[F32]:
        """Run one step over `chunks`; return the output of each, [Q, H, D]."""
        meta = self.meta(chunks, pad)
        self.write(chunks, meta)
        num_rows = len(meta.positions)
        query = self._rows(chunks, self._queries_by_position(), num_rows)
        out = self.subject.get(
            self.subject.backend.attend(
                self.kv,
                self.LAYER,
                self.subject.put(query, self.problem.dtype),
                meta,
                self.problem.spec,
                None if self.problem.sinks is None else self.subject.put(self.problem.sinks),
            )
        )
        loc = meta.host_query_start_loc
        return [out[loc[i] : loc[i + 1]] for i in range(len(chunks))]

    def run(self, pad: Pad = NO_PAD) -> list[F32]:
        """Write the context, then run the batch in one step; return each request's output."""
        self.fill_context()
        return self.attend(self.paged.chunks(self.problem.batch.query_lens), pad)

    def held(self) -> tuple[list[F32], list[F32]]:
        """Return each request's keys and values as the cache exports them."""
        wire = self.subject.export(self.kv, range(self.paged.num_blocks))[:, self.LAYER]
        sides = wire.swapaxes(0, 1).reshape(wire.shape[1], -1, *wire.shape[-2:])
        values = sides[-1, ..., : self.problem.spec.out_size]  # [slots, H_kv, V]
        slots = [self.paged.slots(i) for i in range(len(self.paged.tables))]
        return [sides[0, s] for s in slots], [values[s] for s in slots]

    def _queries_by_position(self) -> list[F32]:
        """Align queries with the context: NaN where a token is not a query of this batch."""
        aligned = []
        for query, length in zip(self.problem.query, self.problem.batch.seq_lens, strict=True):
            out = np.full((length, *query.shape[1:]), np.nan, np.float32)
            out[length - len(query) :] = query
            aligned.append(out)
        return aligned

    def _rows(self, chunks: Sequence[Chunk], of: Sequence[F32], num_rows: int) -> F32:
        """Concatenate the tokens of `chunks`, padded with NaN."""
        tables = [id(table) for table in self.paged.tables]
        parts = [of[tables.index(id(c.table))][c.start : c.end] for c in chunks]
        return pad_rows(np.concatenate(parts), num_rows)
