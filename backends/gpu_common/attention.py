"""Attention: work lists for the kernels, planned on the host, and their launches.

Query tokens are divided into tiles. A narrow tile is a whole request with few new tokens (a
decode); longer requests are divided into wide tiles. A tile is one work item over its whole
context, or several items over parts of it, whose results `merge_kernel` merges.

The result of a narrow tile does not depend on how its context was split: within an item, too,
partial softmaxes are merged at the same multiples of tokens and in the same order. Wide tiles have
no registers left for that, so the last bits of their results may depend on whether the step was
large enough to leave them unsplit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec, StepMeta
from portalm.errors import Unsupported
from portalm_backends.gpu_common import native
from portalm_backends.gpu_common.cache import KV, parts
from portalm_backends.gpu_common.kernels import kv_codes
from portalm_backends.gpu_common.kernels.dependent_launch import options
from portalm_backends.gpu_common.kernels.dies import num_piles
from portalm_backends.gpu_common.kernels.paged_attention import (
    attention_kernel,
    encoder_kernel,
    merge_kernel,
)
from portalm_backends.gpu_common.tiles import power_of_2, tile_shape

Ints = npt.NDArray[np.int32]

ITEM_FIELDS = 8
"""Request; first query row; query tokens (0: padding); position of the first one; first token and
end of the context; index of the partial result (-1: the item covers the whole context); tokens of
one part (a power of 2)."""

MERGE_FIELDS = 4
"""First query row; query tokens (0: padding); first partial result; number of partial results."""

_NARROW_ROWS = 16
"""Query tokens times query heads per KV head in a narrow tile: the least for a tensor core."""

_WIDE_ROWS = 128

_PART_TOKENS = 256
"""Least number of tokens in a part of a context."""

_MOST_PARTS = 32
"""Most parts of a tile; longer contexts have longer parts."""

_MOST_PROGRAMS = 2048
"""Most programs that splitting may add to a launch: programs without work cost time, too."""

_SHARED_HEADS = 16
"""Most query heads per program if values are part of their keys, to fit the sums in registers."""

_MOST_QUERY = 64 * 128
"""Most numbers of the query heads that one program computes, padding included, to fit the shared
memory of the smallest GPUs: 128 heads of 64, 64 of 128 or 32 of 256."""

_LOG2E = 1.4426950408889634


# -- planning ---------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Tiles:
    """The work of one kernel launch."""

    items: torch.Tensor
    """int32 [N, ITEM_FIELDS], most work first."""
    merges: torch.Tensor
    """int32 [M, MERGE_FIELDS]"""
    num_whole: int
    """Number of items, padding included, that hold all work of a step without split tiles."""
    num_partials: int
    """Number of partial results to allocate."""
    tokens: int
    """Most query tokens of a tile."""
    merge_tokens: int
    """Most query tokens of a split tile."""


@dataclass(slots=True, frozen=True)
class AttentionPlan:
    """One step's attention for layers of one kind.

    In a bucket only `splits` and the values in the tensors vary. A captured step is replayed with
    other work by copying another plan's tensors into its own.
    """

    narrow: Tiles | None
    wide: Tiles | None
    native_items: torch.Tensor | None = None
    """int32 [N, native.ITEM_FIELDS]: the same work for the native kernel; only for decodes of at
    most `native.MOST_REQUESTS` requests."""
    splits: bool = True
    """A tile is split. Without, the launches leave out the items for parts, and the merge."""
    may_be_whole: bool = False
    """Steps of this bucket often split nothing: that is worth a graph of its own."""


@dataclass(slots=True)
class _Work:
    """Host lists of one kernel launch, see `Tiles`."""

    items: Ints
    merges: Ints
    num_whole: int
    num_partials: int
    tokens: int
    merge_tokens: int
    splits: bool


def plan_attention(
    meta: StepMeta,
    spec: AttentionSpec,
    to_device: Callable[[Ints], torch.Tensor],
    *,
    num_programs: int = 264,
    has_native: bool = False,
) -> AttentionPlan:
    """Plan a step's attention and copy the plan to the device.

    Args:
        meta: its host fields are read.
        spec: attention parameters of the layers.
        to_device: copies an array to the device.
        num_programs: number of programs that fill the device, two per multiprocessor; contexts
            are split to reach it.
        has_native: the native kernels are available: also plan the decodes that they are faster
            for.
    """
    is_native = has_native and native.has_decodes(spec)
    spec = _spec_of_programs(spec)
    group = spec.num_heads // spec.num_kv_heads
    narrow_tokens, wide_tokens = max(1, _NARROW_ROWS // group), max(1, _WIDE_ROWS // group)
    fill = max(1, num_programs // spec.num_kv_heads)
    most_extra = max(1, _MOST_PROGRAMS // spec.num_kv_heads)
    lengths = np.diff(meta.host_query_start_loc)
    is_narrow = lengths <= narrow_tokens
    bucket = meta.bucket
    num_narrow = num_wide = None
    longest = meta.max_query_len
    if bucket is not None:
        longest = bucket.max_query_len
        num_narrow = bucket.num_requests
        others = min(bucket.num_requests, bucket.num_tokens // (narrow_tokens + 1))
        num_wide = bucket.num_tokens // wide_tokens + others
    window = spec.sliding_window
    # one token or the most that fit: each number compiles another kernel
    tokens = 1 if longest == 1 else narrow_tokens
    narrow = _tiles(meta, lengths, np.flatnonzero((lengths > 0) & is_narrow), narrow_tokens, window)
    works: list[_Work | None] = [_split(narrow, fill, most_extra, tokens, num_narrow), None]
    if longest > narrow_tokens:
        wide = _tiles(meta, lengths, np.flatnonzero(~is_narrow), wide_tokens, window)
        works[1] = _split(wide, fill, most_extra // 4, wide_tokens, num_wide)
    lists = [part for work in works if work is not None for part in (work.items, work.merges)]
    num_requests = len(lengths) if bucket is None else bucket.num_requests
    most = min(fill, native.MOST_REQUESTS)
    is_native = is_native and longest == 1 and num_requests <= most
    if is_native:
        lists.append(native.plan_decodes(meta.host_seq_lens, max_items=fill, window=window))
    flat, offset = to_device(np.concatenate([part.ravel() for part in lists])), 0
    tiles: list[Tiles | None] = []
    for work in works:
        if work is None or not len(work.items):
            tiles.append(None)
            continue
        middle = offset + work.items.size
        end = middle + work.merges.size
        tiles.append(
            Tiles(
                items=flat[offset:middle].view(-1, ITEM_FIELDS),
                merges=flat[middle:end].view(-1, MERGE_FIELDS),
                num_whole=work.num_whole,
                num_partials=work.num_partials,
                tokens=work.tokens,
                merge_tokens=work.merge_tokens,
            )
        )
        offset = end
    native_items = flat[offset:].view(-1, native.ITEM_FIELDS) if is_native else None
    # a step splits contexts that are longer than the share of a program. Decodes of more requests
    # than that many programs, and short prompts, rarely have one
    may_be_whole = bucket is not None and (longest > 1 or num_requests >= fill)
    splits = any(work.splits for work in works if work is not None)
    return AttentionPlan(tiles[0], tiles[1], native_items, splits, may_be_whole)


@functools.cache
def _spec_of_programs(spec: AttentionSpec) -> AttentionSpec:
    """`spec` with a KV head per program, where several programs share one.

    They do if values are part of their keys, or if the query heads of a KV head are too many for
    one program.
    """
    group, most = spec.num_heads // spec.num_kv_heads, _SHARED_HEADS
    if spec.value_size is None:
        most = max(1, _MOST_QUERY // power_of_2(spec.head_size))
        if group <= most:
            return spec
    if spec.value_size == spec.head_size:
        raise Unsupported(
            "the GPU kernels need values that are a part of their keys, smaller than the whole key"
        )
    heads = next(n for n in range(min(group, most), 0, -1) if group % n == 0)
    return replace(spec, num_kv_heads=spec.num_heads // heads)


def _tiles(
    meta: StepMeta,
    lengths: Ints,
    requests: npt.NDArray[np.int64],
    tokens: int,
    window: int | None,
) -> Ints:
    """Divide the query tokens of `requests` into tiles of at most `tokens`: [N, ITEM_FIELDS]."""
    loc = meta.host_query_start_loc
    counts = -(-lengths[requests] // tokens)
    owner = np.repeat(requests, counts)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    tiles = np.zeros((len(owner), ITEM_FIELDS), np.int32)
    tiles[:, 0] = owner
    tiles[:, 1] = loc[owner] + offset
    tiles[:, 2] = np.minimum(lengths[owner] - offset, tokens)
    tiles[:, 3] = (meta.host_seq_lens - lengths)[owner] + offset
    if window is not None:
        tiles[:, 4] = np.maximum(tiles[:, 3] - (window - 1), 0)
    tiles[:, 5] = tiles[:, 3] + tiles[:, 2]
    tiles[:, 6] = -1
    tiles[:, 7] = _part_tokens(tiles[:, 5])
    return tiles


def _part_tokens(context: Ints) -> Ints:
    """Tokens per part, for at most _MOST_PARTS parts; a function of the context length only."""
    least = np.maximum(-(-context // _MOST_PARTS), _PART_TOKENS)
    _, exponent = np.frexp((least - 1).astype(np.float64))  # least - 1 < 2^exponent
    parts: Ints = np.left_shift(1, exponent).astype(np.int32)
    return parts


def _split(tiles: Ints, fill: int, most_extra: int, tokens: int, num_tiles: int | None) -> _Work:
    """Make work items of `tiles`; split the longest contexts so that the device stays busy.

    Args:
        tiles: the tiles, with whole contexts.
        fill: number of items that fill the device.
        most_extra: most items that splitting may add.
        tokens: most query tokens of a tile.
        num_tiles: tiles of the bucket, to pad the lists for; None: no padding.
    """
    context = tiles[:, 5] - tiles[:, 4]
    first_part = tiles[:, 4] // tiles[:, 7]
    num_parts = (tiles[:, 5] - 1) // tiles[:, 7] - first_part + 1
    is_split = (num_parts > 1) & (context > int(context.sum()) // fill)
    if is_split.any():
        order = np.argsort(np.where(is_split, -context, 1), kind="stable")
        fits = np.cumsum(np.where(is_split, num_parts - 1, 0)[order]) <= most_extra
        is_split[order] &= fits
    num_parts = num_parts[is_split]
    first_item = np.cumsum(num_parts) - num_parts
    items = tiles
    if len(num_parts):
        parts = np.repeat(tiles[is_split], num_parts, axis=0)
        index = np.arange(len(parts))
        part = index - np.repeat(first_item, num_parts)
        begin = (np.repeat(first_part[is_split], num_parts) + part) * parts[:, 7]
        parts[:, 4] = np.maximum(parts[:, 4], begin)
        parts[:, 5] = np.minimum(parts[:, 5], begin + parts[:, 7])
        parts[:, 6] = index
        items = np.concatenate([parts, tiles[~is_split]])
    items = items[np.argsort(items[:, 4] - items[:, 5], kind="stable")]
    merges = np.zeros((int(is_split.sum()), MERGE_FIELDS), np.int32)
    merges[:, :2] = tiles[is_split, 1:3]
    merges[:, 2] = first_item
    merges[:, 3] = num_parts
    num_partials = int(num_parts.sum())
    num_whole = len(items) if num_tiles is None else num_tiles
    merge_tokens = int(merges[:, 1].max(initial=0))
    if num_tiles is not None:
        extra = min(most_extra, num_tiles * _MOST_PARTS)
        items = _padded(items, num_tiles + extra)
        merges = _padded(merges, min(num_tiles, extra))
        num_partials, merge_tokens = len(merges) + extra, tokens
    splits = bool(is_split.any())
    return _Work(items, merges, num_whole, num_partials, tokens, merge_tokens, splits)


def _padded(rows: Ints, count: int) -> Ints:
    out = np.zeros((count, rows.shape[1]), np.int32)
    out[: len(rows)] = rows
    return out


# -- launching --------------------------------------------------------------------------------


def attend(
    layer: KV,
    query: torch.Tensor,
    meta: StepMeta,
    spec: AttentionSpec,
    plan: AttentionPlan,
    sinks: torch.Tensor | None = None,
    *,
    family: str = "nvidia",
    num_dies: int = 1,
) -> torch.Tensor:
    """Causal attention of each query token over its request's context.

    Args:
        layer: one layer of the cache; it already holds this step's tokens.
        query: [T, H, D]; contiguous except for the first dimension.
        meta: its `block_table` is read.
        spec: attention parameters of the layer.
        plan: this step's plan for `spec`.
        sinks: float32 [H] if `spec.has_sinks`.
        family: `Arch.family` of the GPU.
        num_dies: dies of the GPU with an L2 cache of their own.

    Returns:
        [T, H, D], or [T, H, value_size], in the dtype of `query`; rows of padding tokens are not
        written.
    """
    shape = (*query.shape[:2], spec.out_size)
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    for kind, tiles in (("narrow", plan.narrow), ("wide", plan.wide)):
        if tiles is not None:
            _launch(
                kind, tiles, plan.splits, layer, query, out, meta, spec, sinks, family, num_dies
            )
    return out


def _launch(
    kind: str,
    tiles: Tiles,
    splits: bool,
    layer: KV,
    query: torch.Tensor,
    out: torch.Tensor,
    meta: StepMeta,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    family: str,
    num_dies: int,
) -> None:
    """Launch the kernel on the items, and a second one if parts have to be merged."""
    sharing = _spec_of_programs(spec).num_kv_heads // spec.num_kv_heads
    spec = _spec_of_programs(spec)
    num_kv_heads, size, value_size = spec.num_kv_heads, spec.head_size, spec.out_size
    numbers, scales, codes = parts(layer)
    group = spec.num_heads // num_kv_heads
    shape = tile_shape(kind, family, query.dtype, size, group, codes != 0)
    tokens = min(shape.rows // group, tiles.tokens)
    num_partials = max(1, tiles.num_partials) if splits else 1
    rows = num_kv_heads * tiles.tokens * group
    sums = (num_partials, rows, value_size)
    partials = torch.empty(sums, dtype=torch.float32, device=out.device)
    part_weights = torch.empty((num_partials, rows, 2), dtype=torch.float32, device=out.device)
    score_scale, cap = spec.scale * _LOG2E, 0.0
    if spec.soft_cap is not None:
        score_scale, cap = 2 * score_scale / spec.soft_cap, spec.soft_cap * _LOG2E
    slopes = None
    if spec.alibi_slopes is not None:
        slopes = slopes_of(spec.alibi_slopes, out.device)
    axes = (len(tiles.items) if splits else tiles.num_whole, num_kv_heads)
    num_parts = math.ceil(tiles.tokens / tokens)
    grid = (*(axes if kind == "wide" else axes[::-1]), num_parts)
    attention_kernel[grid](
        query,
        numbers,
        out if scales is None else scales,
        out,
        partials,
        part_weights,
        meta.block_table,
        tiles.items,
        out if slopes is None else slopes,
        out if sinks is None else sinks,
        query.stride(0),
        meta.block_table.stride(0),
        score_scale,
        cap,
        spec.sliding_window or 0,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        SHARING=sharing,
        D=size,
        V=value_size,
        VP=max(16, power_of_2(value_size)),
        REST=max(16, power_of_2(size - value_size)) if size > value_size else 0,
        BLOCK=numbers.shape[3],
        TILE=shape.tile,
        ROWS=shape.rows,
        TOKENS=tokens,
        ITEM_TOKENS=tiles.tokens,
        IS_WIDE=kind == "wide",
        OVERLAPS=shape.overlaps and kind == "wide" and size == value_size,
        HAS_CAP=spec.soft_cap is not None,
        HAS_WINDOW=spec.sliding_window is not None,
        HAS_ALIBI=slopes is not None,
        HAS_SINKS=sinks is not None,
        CODES=codes,
        DIES=num_dies,
        PILES=num_piles(num_kv_heads, num_dies),
        **kv_codes.options(),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
        **shape.options(),
        **options(),
    )
    if splits and len(tiles.merges):
        merge_kernel[(num_kv_heads, len(tiles.merges), tiles.merge_tokens)](
            partials,
            part_weights,
            out,
            tiles.merges,
            out if sinks is None else sinks,
            GROUP=group,
            GROUP_PADDED=power_of_2(group),
            NUM_KV_HEADS=num_kv_heads,
            D=value_size,
            DP=max(16, power_of_2(value_size)),
            ITEM_TOKENS=tiles.tokens,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            enable_fp_fusion=True,
            **options(),
        )


@functools.cache
def slopes_of(slopes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """ALiBi slopes, float32 [H]; cached, so that captured steps can keep the address."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def attend_encoder(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: StepMeta,
    spec: AttentionSpec,
    *,
    family: str = "nvidia",
) -> torch.Tensor:
    """Attention of each token to all tokens of its request.

    Args:
        query: [T, H, D], whole prompts end to end; contiguous except for the first dimension.
        key: [T, H_kv, D], likewise.
        value: same shape as `key`.
        meta: its `query_start_loc` is read on the device.
        spec: scale, heads and window.
        family: `Arch.family` of the GPU.

    Returns:
        [T, H, D], in the dtype of `query`; rows of padding tokens are not written.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = spec.num_heads // spec.num_kv_heads
    shape = tile_shape("encoder", family, query.dtype, spec.head_size, group)
    tokens = shape.rows // group
    longest = meta.max_query_len if meta.bucket is None else meta.bucket.max_query_len
    num_requests = len(meta.query_start_loc) - 1
    encoder_kernel[(math.ceil(longest / tokens), spec.num_kv_heads, num_requests)](
        query,
        key,
        value,
        out,
        meta.query_start_loc,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        spec.scale * _LOG2E,
        spec.sliding_window or 0,
        GROUP=group,
        NUM_KV_HEADS=spec.num_kv_heads,
        D=spec.head_size,
        DP=max(16, power_of_2(spec.head_size)),
        TILE=shape.tile,
        ROWS=shape.rows,
        TOKENS=tokens,
        HAS_WINDOW=spec.sliding_window is not None,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
        **shape.options(),
    )
    return out
