"""Attention of encoders: every token attends to its whole request, without a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from portalm.backend import AttentionSpec, StepMeta

_PLAN = "encoder"


@dataclass(frozen=True, slots=True)
class _SameLength:
    """Requests of equal length: one batch for torch, without padding."""

    tokens: torch.Tensor
    """int64 [N * L]: the tokens of the N requests, concatenated."""
    num_requests: int


def attention(
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
        [T, H, D], in the dtype of `query`; rows of pad tokens are not written.
    """
    if _PLAN not in meta.plan:  # once per step, for all layers
        meta.plan[_PLAN] = _group(meta, query.device)
    groups: list[_SameLength] = meta.plan[_PLAN]
    out = torch.empty_like(query)
    for group in groups:
        q, k, v = (
            x[group.tokens].view(group.num_requests, -1, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )  # [N, H, L, D]
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_near(q.shape[2], spec.sliding_window, query.device),
            scale=spec.scale,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )
        out[group.tokens] = attended.transpose(1, 2).flatten(0, 1)
    return out


def _near(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [L, L]: which tokens attend to each other; None: all."""
    if window is None or window >= length:
        return None
    place = torch.arange(length, device=device)
    return (place[:, None] - place).abs() < window


def _group(meta: StepMeta, device: torch.device) -> list[_SameLength]:
    starts = meta.host_query_start_loc[:-1].astype(np.int64)
    lengths = np.diff(meta.host_query_start_loc)
    groups = []
    for length in np.unique(lengths[lengths > 0]):
        firsts = starts[lengths == length]
        tokens = (firsts[:, None] + np.arange(length)).ravel()
        groups.append(_SameLength(torch.from_numpy(tokens).to(device), len(firsts)))
    return groups
