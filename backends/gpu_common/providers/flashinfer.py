"""FlashInfer (Ye et al., 2025): paged prefill attention for NVIDIA GPUs.

`BatchPrefillWithPagedKVCacheWrapper` takes pages [NB, H_kv, B, D] (layout HND) with strides, which
must be the same for keys and values: the cache is passed as two views. A wrapper plans on the host,
once per step, in a pinned buffer that it copies from asynchronously; wrappers take turns so that no
buffer is written before its copy is done.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from portalm.backend import StepMeta
from portalm_backends.gpu_common.providers.provider import LayerKind, planes, unsupported

_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation allocates."""

_NUM_WRAPPERS = 4
"""More than the steps in flight: a plan has been copied before its wrapper's turn comes again."""


class FlashInfer:
    """Finds and opens flashinfer."""

    package = "flashinfer"
    archs = frozenset({"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"})

    def refuses(self, kind: LayerKind) -> str | None:
        """Reason why it cannot compute these layers; None if it can."""
        if kind.spec.head_size not in (64, 128, 256):
            return f"head size {kind.spec.head_size} is not 64, 128 or 256"
        return unsupported(kind.spec, kind.dtype)

    def open(self, kind: LayerKind) -> FlashInferRun:
        """Import the package and allocate a workspace; kernels are compiled by the first call."""
        return FlashInferRun(importlib.import_module(self.package), kind)


class FlashInferRun:
    """FlashInfer for one kind of layer."""

    def __init__(self, module: Any, kind: LayerKind) -> None:
        """Use `module`, flashinfer."""
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=kind.device)
        self._kind = kind
        self._wrappers = [
            module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            for _ in range(_NUM_WRAPPERS)
        ]
        self._planned: StepMeta | None = None

    def attend(self, layer: torch.Tensor, query: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Causal attention of query [T, H, D]: [T, H, D]."""
        if self._planned is not meta:
            self._wrappers.append(self._wrappers.pop(0))
            self._plan(meta)
            self._planned = meta
        out: torch.Tensor = self._wrappers[0].run(query, planes(layer))
        return out

    def _plan(self, meta: StepMeta) -> None:
        kind, spec = self._kind, self._kind.spec
        num_requests = len(meta.host_query_start_loc) - 1
        lengths = meta.host_seq_lens[:num_requests]
        pages = -(-lengths // kind.block_size)
        starts = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        row = np.repeat(np.arange(num_requests), pages)
        column = np.arange(len(row)) - starts[row]
        places = kind.to_device(np.stack([row, column]).astype(np.int64))  # [2, pages]
        self._wrappers[0].plan(
            torch.from_numpy(np.ascontiguousarray(meta.host_query_start_loc, np.int32)),
            torch.from_numpy(starts),
            meta.block_table[places[0], places[1]],
            torch.from_numpy((lengths - (pages - 1) * kind.block_size).astype(np.int32)),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            kind.block_size,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            logits_soft_cap=spec.soft_cap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )
