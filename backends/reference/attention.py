"""Attention in plain torch: causal over the paged cache, and bidirectional without a cache."""

from __future__ import annotations

import itertools

import torch

from portalm.backend import AttentionSpec, StepMeta
from portalm_backends.reference import cache


def paged_attention(
    query: torch.Tensor,
    kv: cache.KV,
    layer: int,
    meta: StepMeta,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each query token over its request's cached context.

    Args:
        query: [T, H, D], the new tokens of all requests, concatenated.
        kv: the cache, which already holds this step.
        layer: index of the layer in the cache.
        meta: which query tokens and which blocks belong to which request.
        spec: scale, sliding window, soft cap, ALiBi slopes.
        sinks: float32 [H], if `spec.has_sinks`.

    Returns:
        [T, H, D], or [T, H, value_size], in the dtype of `query`; rows of pad tokens are zero.
    """
    out = query.new_zeros((*query.shape[:2], spec.out_size))
    group_size = spec.num_heads // spec.num_kv_heads
    for i, seq_len in enumerate(meta.host_seq_lens.tolist()):
        start, end = meta.host_query_start_loc[i : i + 2].tolist()
        if seq_len == 0:
            continue
        q = query[start:end].float()  # [q_len, H, D]
        first = _window_start(seq_len - len(q), spec)
        k, v = (
            _gather(kv, layer, side, meta.block_table[i], seq_len)[first:] for side in (0, -1)
        )  # [seq_len - first, H_kv, D]
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))  # [.., H, D]
        v = v[..., : spec.out_size]

        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        position = torch.arange(seq_len - len(q), seq_len)[:, None]
        context = torch.arange(first, seq_len)[None, :]
        if spec.alibi_slopes is not None:
            slopes = torch.tensor(spec.alibi_slopes)[:, None, None]
            scores = scores + slopes * (context - position)
        is_hidden = context > position
        if spec.sliding_window is not None:
            is_hidden |= context <= position - spec.sliding_window
        scores = scores.masked_fill(is_hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, sink), dim=-1)
        probs = scores.softmax(dim=-1)[..., : seq_len - first]
        out[start:end] = torch.einsum("hqk,khd->qhd", probs, v).to(query.dtype)
    return out


def encoder_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: StepMeta,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of each token to all tokens of its request.

    Args:
        query: [T, H, D], whole prompts, concatenated.
        key: [T, H_kv, D]
        value: [T, H_kv, D]
        meta: which tokens belong to which request.
        spec: scale and window.

    Returns:
        [T, H, D], in the dtype of `query`; rows of pad tokens are zero.
    """
    out = torch.zeros_like(query)
    group_size = spec.num_heads // spec.num_kv_heads
    loc = meta.host_query_start_loc.tolist()
    for start, end in itertools.pairwise(loc):
        q = query[start:end].float()  # [N, H, D]
        k, v = (
            x[start:end].float().repeat_interleave(group_size, dim=1) for x in (key, value)
        )  # [N, H, D]
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.sliding_window is not None:
            place = torch.arange(end - start)
            is_far = (place[:, None] - place).abs() >= spec.sliding_window
            scores = scores.masked_fill(is_far, float("-inf"))
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).to(query.dtype)
    return out


def _window_start(position: int, spec: AttentionSpec) -> int:
    """Position of the first token in the window of a query; slots before it may hold anything."""
    return 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)


def _gather(
    kv: cache.KV, layer: int, side: int, block_table: torch.Tensor, seq_len: int
) -> torch.Tensor:
    """Gather a request's keys (side 0) or values (-1) in order: float32 [seq_len, H_kv, D]."""
    num_blocks = -(-seq_len // kv.shape[3])
    blocks = block_table[:num_blocks].long()
    return cache.read(kv, layer, side, blocks).flatten(0, 1)[:seq_len]
