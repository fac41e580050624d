"""ReferenceBackend: what correct means, on any machine that runs torch."""

from __future__ import annotations

import torch

from portalm.backend import (
    KV,
    AttentionSpec,
    Capabilities,
    DeviceReport,
    KVSpec,
    MemInfo,
    StepMeta,
)
from portalm_backends.portable import host_memory
from portalm_backends.portable.backend import TorchBackend
from portalm_backends.reference import attention, cache


class ReferenceBackend(TorchBackend):
    """Plain torch on the host: slow, short, and the measure of every other backend."""

    name = "reference"
    rank = 0
    capabilities = Capabilities(
        dtypes=cache.DTYPES,
        kv_dtypes=cache.DTYPES,
        features=frozenset({"sliding_window", "soft_cap", "alibi", "sinks", "shared_values"}),
    )

    @classmethod
    def find(cls) -> DeviceReport:
        """Runs wherever torch does."""
        return DeviceReport(
            is_available=True,
            summary=f"plain torch {torch.__version__} on the host; slow on purpose",
            details=(("torch threads", str(torch.get_num_threads())),),
        )

    def memory(self) -> MemInfo:
        """The host's, or what its container allows."""
        return host_memory.memory()

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Keys and values of one block over all layers."""
        return cache.bytes_per_block(spec)

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """One tensor [L, P, NB, B, H_kv, D]: keys and values, or keys alone."""
        return cache.allocate(spec, num_blocks)

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Scatter [T, H_kv, D] each into their slots."""
        return cache.write(kv, layer, key, value, meta)

    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of [T, H, D], one request after the other."""
        return attention.paged_attention(query, kv[layer, 0], kv[layer, -1], meta, spec, sinks)

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attention of [T, H, D] within each request, one after the other."""
        return attention.encoder_attention(query, key, value, meta, spec)
