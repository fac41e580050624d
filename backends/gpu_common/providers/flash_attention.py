"""FlashAttention-3 (Shah et al., 2024; module flash_attn_interface) for Hopper.

`flash_attn_with_kvcache` takes pages [NB, B, H_kv, D] with any strides except the last, and a table
of pages as the engine has it: the cache is passed as a view.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from portalm.backend import StepMeta
from portalm_backends.gpu_common.providers.provider import LayerKind, planes, unsupported


class FlashAttention3:
    """Finds and opens flash_attn_interface."""

    package = "flash_attn_interface"
    archs = frozenset({"sm_90"})

    def refuses(self, kind: LayerKind) -> str | None:
        """Reason why it cannot compute these layers; None if it can."""
        size = kind.spec.head_size
        if size % 8 or size > 256:
            return f"head size {size} is not a multiple of 8 up to 256"
        return unsupported(kind.spec, kind.dtype)

    def open(self, kind: LayerKind) -> FlashAttention3Run:
        """Import the package."""
        return FlashAttention3Run(importlib.import_module(self.package), kind)


class FlashAttention3Run:
    """FlashAttention-3 for one kind of layer."""

    def __init__(self, module: Any, kind: LayerKind) -> None:
        """Use `module`, flash_attn_interface."""
        spec = kind.spec
        self._compute = module.flash_attn_with_kvcache
        self._options: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "causal": True,
            "softcap": spec.soft_cap or 0.0,
        }
        if spec.sliding_window is not None:  # tokens before the query's, without itself
            self._options["window_size"] = (spec.sliding_window - 1, 0)

    def attend(self, layer: torch.Tensor, query: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Causal attention of query [T, H, D]: [T, H, D]."""
        keys, values = (plane.transpose(1, 2) for plane in planes(layer))  # [NB, B, H_kv, D]
        num_requests = len(meta.query_start_loc) - 1
        out: torch.Tensor = self._compute(
            query,
            keys,
            values,
            cache_seqlens=meta.seq_lens[:num_requests],
            page_table=meta.block_table[:num_requests],
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            **self._options,
        )
        return out
