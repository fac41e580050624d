"""Optional attention packages, replaced by plain torch functions with the same signatures.

They read pages through strides, as the packages do, and can be given one fault each.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch

FAULTS = {
    "a window of one token less": "window",
    "no soft cap": "cap",
    "values of slots without a token": "slots",
    "pages in another order": "order",
    "another dtype": "dtype",
    "an exception": "raises",
}


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    pages: list[torch.Tensor],
    *,
    scale: float,
    window_left: int,
    cap: float,
    fault: str = "",
) -> torch.Tensor:
    """Attention of query [T, H, D] over pages [NB, B, H_kv, D], in float64.

    Args:
        query: [T, H, D]
        keys: [NB, B, H_kv, D]
        values: likewise.
        starts: first row of each request, and the number of rows.
        lengths: context length of each request.
        pages: pages of each request, in order.
        scale: of the scores.
        window_left: tokens before the query's that it attends to; -1: all.
        cap: soft cap of the scores; 0: none.
        fault: one of the values of `FAULTS`, "memory" or "lost" for an error of the device.
    """
    if fault == "raises":
        raise ValueError("no kernel for this shape")
    if fault == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if fault == "lost":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    out = torch.empty(query.shape, dtype=torch.float32 if fault == "dtype" else query.dtype)
    group = query.shape[1] // keys.shape[2]
    for i, length in enumerate(lengths):
        rows = slice(starts[i], starts[i + 1])
        order = pages[i].flip(0) if fault == "order" else pages[i]
        k, v = (x[order].flatten(0, 1).double() for x in (keys, values))  # [pages * B, H_kv, D]
        if fault != "slots":
            k, v = k[:length], v[:length]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), k) * scale
        if cap and fault != "cap":
            scores = cap * torch.tanh(scores / cap)
        position = torch.arange(length - len(query[rows]), length)[:, None]
        token = torch.arange(scores.shape[2])
        is_seen = token <= position
        if window_left >= 0:
            is_seen &= token >= position - window_left + (fault == "window")
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)
    return out


class FakeFlashAttention:
    """flash_attn_interface, and what it was called with."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: None = None,
        v: None = None,
        qv: None = None,
        rotary_cos: None = None,
        rotary_sin: None = None,
        cache_seqlens: torch.Tensor | None = None,
        cache_batch_idx: None = None,
        cache_leftpad: None = None,
        page_table: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k_new: None = None,
        max_seqlen_q: int | None = None,
        rotary_seqlens: None = None,
        q_descale: None = None,
        k_descale: None = None,
        v_descale: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: None = None,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
    ) -> torch.Tensor:
        assert page_table is not None and cache_seqlens is not None and cu_seqlens_q is not None
        assert causal and softmax_scale is not None
        assert all(x.dtype == torch.int32 for x in (page_table, cache_seqlens, cu_seqlens_q))
        assert all(x.stride(-1) == 1 for x in (q, k_cache, v_cache, page_table))
        assert page_table.shape[0] == len(cache_seqlens) == len(cu_seqlens_q) - 1
        starts, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
        assert max_seqlen_q == max(b - a for a, b in pairwise(starts))
        assert window_size in ((-1, -1), (window_size[0], 0))
        self.calls.append({"key": k_cache, "value": v_cache})
        pages = [
            row[: -(-n // k_cache.shape[1])] for row, n in zip(page_table, lengths, strict=True)
        ]
        return paged_attention(
            q, k_cache, v_cache, starts, lengths, pages,
            scale=softmax_scale, window_left=window_size[0], cap=softcap, fault=self.fault,
        )  # fmt: skip


class FakeFlashInfer:
    """flashinfer, and what its wrappers were called with."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls: list[dict[str, Any]] = []
        self.plans = 0

    def BatchPrefillWithPagedKVCacheWrapper(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"
    ) -> FakeWrapper:
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8
        return FakeWrapper(self)


class FakeWrapper:
    """BatchPrefillWithPagedKVCacheWrapper of layout HND."""

    def __init__(self, package: FakeFlashInfer) -> None:
        self._package = package

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert causal and sm_scale is not None and kv_data_type == q_data_type
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in indices)
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        assert all(1 <= n <= page_size for n in paged_kv_last_page_len.tolist())
        self._starts, offsets = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self._pages = [paged_kv_indices[a:b] for a, b in pairwise(offsets)]
        self._lengths = [
            (len(pages) - 1) * page_size + last
            for pages, last in zip(self._pages, paged_kv_last_page_len.tolist(), strict=True)
        ]
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._options = {"scale": sm_scale, "window_left": window_left, "cap": logits_soft_cap or 0}
        self._package.plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        keys, values = paged_kv_cache  # [NB, H_kv, B, D]
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
        assert self._shape == (q.shape[1], keys.shape[1], q.shape[2], keys.shape[2])
        self._package.calls.append({"key": keys, "value": values})
        return paged_attention(
            q, keys.transpose(1, 2), values.transpose(1, 2), self._starts, self._lengths,
            self._pages, fault=self._package.fault, **self._options,
        )  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, name: str, package: object) -> None:
    """Make `import name` return a module with the public methods of `package`."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for method in dir(package):
        if not method.startswith("_") and callable(getattr(package, method)):
            setattr(module, method, getattr(package, method))
    monkeypatch.setitem(sys.modules, name, module)
