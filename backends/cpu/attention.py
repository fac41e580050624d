"""Splits one step's attention into work items for the thread team: numpy, outside the step.

An item is a tile of one request's query tokens, against all of its context or one split of it; the
kernel runs each item once for every KV head. The split never shows in a result: a row's arithmetic
is a function of its position alone (see csrc_cpu/attention.h). The columns of an item and the
context of one split are constants of the native module (csrc_cpu/kernels.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from portalm.backend import AttentionSpec, StepMeta

_TILE_ROWS = 36
"""Query rows (tokens times query heads per KV head) of an item: what the L1 cache holds."""

_ITEMS_PER_THREAD = 4
"""An item with more than 1 / this of a thread's share of the work is split over its context."""


@dataclass(slots=True, frozen=True)
class AttentionPlan:
    """The work of one step for layers of one kind."""

    items: npt.NDArray[np.int32]
    """[N, columns], most work first."""
    partials: npt.NDArray[np.float32]
    """Space for one partial result per split of each split tile and KV head."""
    counters: npt.NDArray[np.int32]
    """[split tiles, H_kv]: finished splits; zero between layers."""
    arguments: dict[str, int]
    """The kernel's arguments with the role "plan": addresses of the arrays and their sizes."""

    @classmethod
    def of(
        cls,
        items: npt.NDArray[np.int32],
        *,
        partials: npt.NDArray[np.float32],
        counters: npt.NDArray[np.int32],
    ) -> AttentionPlan:
        """A plan that keeps these arrays alive."""
        arguments = {
            "items": items.ctypes.data,
            "num_items": len(items),
            "partials": partials.ctypes.data,
            "counters": counters.ctypes.data,
        }
        return cls(items=items, partials=partials, counters=counters, arguments=arguments)


def plan_attention(meta: StepMeta, spec: AttentionSpec, native: Any) -> AttentionPlan:
    """Cut a step's attention into items.

    Args:
        meta: only `host_query_start_loc` and `host_seq_lens` are read.
        spec: of the layers.
        native: the native module; its threads share the items.
    """
    split_tokens = native.SPLIT_TOKENS
    group = spec.num_heads // spec.num_kv_heads
    if meta.max_query_len == 1 and meta.max_seq_len <= split_tokens and not spec.sliding_window:
        return _short_decodes(meta, native)
    column = native.ITEM_COLUMNS
    tiles = _tiles(meta, max(1, _TILE_ROWS // group), spec.sliding_window, column)
    num_tokens, begin, end = (tiles[:, column[name]] for name in ("num_tokens", "begin", "end"))
    num_splits = (end - 1) // split_tokens - begin // split_tokens + 1
    cost = num_tokens.astype(np.int64) * (end - begin)
    total = int(cost.sum()) * spec.num_kv_heads
    is_split = (num_splits > 1) & (cost > total // (native.num_threads() * _ITEMS_PER_THREAD))
    whole, split = tiles[~is_split], tiles[is_split]
    whole[:, column["partial"]] = -1
    num_splits = num_splits[is_split]
    if len(split):
        items = np.concatenate([_split(split, num_splits, split_tokens, column), whole])
    else:
        items = whole
    num_tokens, begin, end = (items[:, column[name]] for name in ("num_tokens", "begin", "end"))
    work = num_tokens.astype(np.int64) * (end - begin)
    items = np.ascontiguousarray(items[np.argsort(-work, kind="stable")])
    max_rows = int(tiles[:, column["num_tokens"]].max(initial=0)) * group
    num_partials = int(num_splits.sum()) * spec.num_kv_heads
    num_floats = num_partials * native.partial_floats(max_rows, spec.out_size)
    return AttentionPlan.of(
        items,
        partials=np.empty(num_floats, np.float32),
        counters=np.zeros(len(split) * spec.num_kv_heads, np.int32),
    )


def _short_decodes(meta: StepMeta, native: Any) -> AttentionPlan:
    """One item per request, as `plan_attention` would make them, most work first."""
    column = native.ITEM_COLUMNS
    lens = meta.host_seq_lens
    order = np.argsort(-lens, kind="stable")
    order = order[: int(np.count_nonzero(lens))]  # pad requests have no context
    items = np.zeros((len(order), len(column)), np.int32)
    items[:, column["request"]] = order
    items[:, column["first_token"]] = meta.host_query_start_loc[order]
    items[:, column["num_tokens"]] = 1
    items[:, column["position"]] = lens[order] - 1
    items[:, column["end"]] = lens[order]
    items[:, column["partial"]] = -1
    return AttentionPlan.of(items, partials=_NO_PARTIALS, counters=_NO_COUNTERS)


_NO_PARTIALS = np.zeros(1, np.float32)
_NO_COUNTERS = np.zeros(1, np.int32)


def _tiles(
    meta: StepMeta, tile_tokens: int, window: int | None, column: dict[str, int]
) -> npt.NDArray[np.int32]:
    """[N, columns]: each request's query tokens cut into tiles; pad requests have none."""
    loc = meta.host_query_start_loc
    query_lens = np.diff(loc)
    num_tiles = -(-query_lens // tile_tokens)
    request = np.repeat(np.arange(len(query_lens), dtype=np.int32), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    offset = (np.arange(len(request)) - first_tile[request]) * tile_tokens
    num_tokens = np.minimum(query_lens[request] - offset, tile_tokens)
    position = (meta.host_seq_lens - query_lens)[request] + offset
    tiles = np.zeros((len(request), len(column)), np.int32)
    tiles[:, column["request"]] = request
    tiles[:, column["first_token"]] = loc[:-1][request] + offset
    tiles[:, column["num_tokens"]] = num_tokens
    tiles[:, column["position"]] = position
    if window is not None:
        tiles[:, column["begin"]] = np.maximum(position - (window - 1), 0)
    tiles[:, column["end"]] = position + num_tokens
    return tiles


def _split(
    tiles: npt.NDArray[np.int32],
    num_splits: npt.NDArray[np.int32],
    split_tokens: int,
    column: dict[str, int],
) -> npt.NDArray[np.int32]:
    """One item per split of every tile: [sum of num_splits, columns]."""
    tile = np.repeat(np.arange(len(tiles)), num_splits)
    first_partial = np.cumsum(num_splits) - num_splits
    index = np.arange(len(tile)) - first_partial[tile]  # of the split within its tile
    items = tiles[tile]
    begin, end = items[:, column["begin"]], items[:, column["end"]]  # views
    first = (begin // split_tokens + index) * split_tokens
    np.maximum(begin, first, out=begin, casting="same_kind")
    np.minimum(end, first + split_tokens, out=end, casting="same_kind")
    items[:, column["partial"]] = first_partial[tile] + index
    items[:, column["tile"]] = tile
    items[:, column["first_partial"]] = first_partial[tile]
    items[:, column["num_partials"]] = num_splits[tile]
    return items
