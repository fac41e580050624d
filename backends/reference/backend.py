"""ReferenceBackend: the definition of correct results, on any machine that runs torch."""

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
from portalm_backends.portable import host_memory, kv_codes
from portalm_backends.portable.backend import TorchBackend
from portalm_backends.reference import attention, cache


class ReferenceBackend(TorchBackend):
    """Plain torch on the host: slow and short; every other backend is compared with it."""

    name = "reference"
    rank = 0
    capabilities = Capabilities(
        dtypes=cache.DTYPES,
        kv_dtypes=cache.KV_DTYPES,
        features=frozenset({"sliding_window", "soft_cap", "alibi", "sinks", "shared_values"}),
    )

    @classmethod
    def find(cls) -> DeviceReport:
        """Report the host, which is always available."""
        return DeviceReport(
            is_available=True,
            summary=f"plain torch {torch.__version__} on the host; slow by design",
            details=(("torch threads", str(torch.get_num_threads())),),
        )

    def memory(self) -> MemInfo:
        """Return the host's memory, or its container's limit."""
        return host_memory.memory()

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Return the bytes of one block over all layers."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """Allocate one tensor [L, P, NB, B, H_kv, D], or two for 8-bit codes and their scales."""
        return cache.allocate(spec, num_blocks)

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Scatter keys and values, [T, H_kv, D] each, to their slots."""
        return cache.write(kv, layer, key, value, meta)

    def kv_copy(self, kv: KV, src: torch.Tensor, dst: torch.Tensor) -> KV:
        """Copy blocks src[i] to dst[i], int32 [N] each, over all layers."""
        if not isinstance(kv, cache.ScaledKV):
            return super().kv_copy(kv, src, dst)
        cache.copy(kv, src.long(), dst.long())
        return kv

    def kv_export(self, kv: KV, blocks: torch.Tensor) -> torch.Tensor:
        """Return blocks int32 [N] as [N, L, P, B, H_kv, D]."""
        if not isinstance(kv, cache.ScaledKV):
            return super().kv_export(kv, blocks)
        return cache.export_blocks(kv, blocks.long())

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """Write blocks in the wire layout."""
        if not isinstance(kv, cache.ScaledKV):
            return super().kv_import(kv, blocks, wire)
        cache.import_blocks(kv, blocks.long(), wire)
        return kv

    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of [T, H, D], one request after the other."""
        return attention.paged_attention(query, kv, layer, meta, spec, sinks)

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
