"""Splits one step's attention into work items for the thread team: numpy, outside the step.

An item is a tile of query tokens of one request, against all of its context or one split of it;
the kernel runs each item once for every KV head. How the work is split never shows in a result:
a row's arithmetic is a function of its position alone (see csrc_cpu/attention.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portalm.backend import AttentionSpec, StepMeta

SPLIT_TOKENS = 256
"""Context of one split. Part of a result's meaning: partial softmaxes are merged at multiples of
it, in order, wherever they were computed."""

_TILE_ROWS = 36
"""Query rows (tokens times query heads a KV head) of an item: what the L1 cache holds."""

_MOST_LANES = 16
"""Floats of the widest vector: rows of partial results are made of whole ones."""

_ITEMS_PER_THREAD = 4
"""An item that takes more than this share of a thread's part is split over its context."""

ITEM_FIELDS = 10
"""request; first query token; query tokens; position of the first one; first and last + 1 token
of the context; partial result to write (-1: the item covers its whole context); tile among the
split ones; that tile's first partial result and their number."""


@dataclass(slots=True, frozen=True)
class AttentionPlan:
    """The work of one step for layers of one kind."""

    items: npt.NDArray[np.int32]
    """[N, ITEM_FIELDS], most work first."""
    items_ptr: int
    """Address of `items`."""
    num_items: int
    partials: npt.NDArray[np.float32]
    """Room for a partial result of every split of a split tile and KV head."""
    partials_ptr: int
    counters: npt.NDArray[np.int32]
    """[split tiles, H_kv]: splits that are done; zero between layers."""
    counters_ptr: int

    @classmethod
    def of(
        cls,
        items: npt.NDArray[np.int32],
        *,
        partials: npt.NDArray[np.float32],
        counters: npt.NDArray[np.int32],
    ) -> AttentionPlan:
        """A plan over these arrays, which it keeps."""
        return cls(
            items=items,
            items_ptr=items.ctypes.data,
            num_items=len(items),
            partials=partials,
            partials_ptr=partials.ctypes.data,
            counters=counters,
            counters_ptr=counters.ctypes.data,
        )


def plan_attention(meta: StepMeta, spec: AttentionSpec, num_threads: int) -> AttentionPlan:
    """Items of a step's attention.

    Args:
        meta: `host_query_start_loc` and `host_seq_lens` are looked at.
        spec: of the layers.
        num_threads: how many share the items.
    """
    group = spec.num_heads // spec.num_kv_heads
    if meta.max_query_len == 1 and meta.max_seq_len <= SPLIT_TOKENS and not spec.sliding_window:
        return _short_decodes(meta)
    tiles = _tiles(meta, max(1, _TILE_ROWS // group), spec.sliding_window)
    num_splits = (tiles[:, 5] - 1) // SPLIT_TOKENS - tiles[:, 4] // SPLIT_TOKENS + 1
    cost = tiles[:, 2].astype(np.int64) * (tiles[:, 5] - tiles[:, 4])
    total = int(cost.sum()) * spec.num_kv_heads
    is_split = (num_splits > 1) & (cost > total // (num_threads * _ITEMS_PER_THREAD))
    whole, split = tiles[~is_split], tiles[is_split]
    whole[:, 6] = -1
    num_splits = num_splits[is_split]
    items = np.concatenate([_split(split, num_splits), whole]) if len(split) else whole
    work = items[:, 2].astype(np.int64) * (items[:, 5] - items[:, 4])
    items = np.ascontiguousarray(items[np.argsort(-work, kind="stable")])
    max_rows = int(tiles[:, 2].max(initial=0)) * group
    num_partials = int(num_splits.sum()) * spec.num_kv_heads
    row_floats = -(-spec.out_size // _MOST_LANES) * _MOST_LANES + 2
    return AttentionPlan.of(
        items,
        partials=np.empty(num_partials * max_rows * row_floats, np.float32),
        counters=np.zeros(len(split) * spec.num_kv_heads, np.int32),
    )


def _short_decodes(meta: StepMeta) -> AttentionPlan:
    """An item for each request, as `plan_attention` would make them, most work first."""
    lens = meta.host_seq_lens
    order = np.argsort(-lens, kind="stable")
    order = order[: int(np.count_nonzero(lens))]  # pad requests have no context
    items = np.zeros((len(order), ITEM_FIELDS), np.int32)
    items[:, 0] = order
    items[:, 1] = meta.host_query_start_loc[order]
    items[:, 2] = 1
    items[:, 3] = lens[order] - 1
    items[:, 5] = lens[order]
    items[:, 6] = -1
    return AttentionPlan.of(items, partials=_NO_PARTIALS, counters=_NO_COUNTERS)


_NO_PARTIALS = np.zeros(1, np.float32)
_NO_COUNTERS = np.zeros(1, np.int32)


def _tiles(meta: StepMeta, tile_tokens: int, window: int | None) -> npt.NDArray[np.int32]:
    """[N, ITEM_FIELDS]: every request's query tokens cut into tiles; pad requests have none."""
    loc = meta.host_query_start_loc
    query_lens = np.diff(loc)
    num_tiles = -(-query_lens // tile_tokens)
    request = np.repeat(np.arange(len(query_lens), dtype=np.int32), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    offset = (np.arange(len(request)) - first_tile[request]) * tile_tokens
    tiles = np.zeros((len(request), ITEM_FIELDS), np.int32)
    tiles[:, 0] = request
    tiles[:, 1] = loc[:-1][request] + offset
    tiles[:, 2] = np.minimum(query_lens[request] - offset, tile_tokens)
    tiles[:, 3] = (meta.host_seq_lens - query_lens)[request] + offset
    if window is not None:
        tiles[:, 4] = np.maximum(tiles[:, 3] - (window - 1), 0)
    tiles[:, 5] = tiles[:, 3] + tiles[:, 2]
    return tiles


def _split(
    tiles: npt.NDArray[np.int32], num_splits: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """One item a split of every tile: [sum of num_splits, ITEM_FIELDS]."""
    tile = np.repeat(np.arange(len(tiles)), num_splits)
    first_partial = np.cumsum(num_splits) - num_splits
    index = np.arange(len(tile)) - first_partial[tile]  # of the split in its tile
    items = tiles[tile]
    begin = (items[:, 4] // SPLIT_TOKENS + index) * SPLIT_TOKENS
    items[:, 4] = np.maximum(items[:, 4], begin)
    items[:, 5] = np.minimum(items[:, 5], begin + SPLIT_TOKENS)
    items[:, 6] = first_partial[tile] + index
    items[:, 7] = tile
    items[:, 8] = first_partial[tile]
    items[:, 9] = num_splits[tile]
    return items
