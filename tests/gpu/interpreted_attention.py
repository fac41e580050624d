"""The attention and cache behind the seam, on CPU tensors, for the conformance kit's cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from portalm.backend import SCALED_KV_DTYPES, AttentionSpec, Bucket, Capabilities, KVSpec, StepMeta
from portalm_backends.gpu_common import attention, cache
from portalm_backends.portable import kv_codes
from portalm_backends.reference.backend import ReferenceBackend


class InterpretedAttention(ReferenceBackend):
    """Kernels of attention and cache are interpreted; all else is the reference's.

    float32 and float16 only: the interpreter multiplies the bits of bfloat16.
    """

    name = "interpreted-attention"
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "float16"}),
        kv_dtypes=frozenset({"float32", "float16", *SCALED_KV_DTYPES}),
        head_sizes=cache.HEAD_SIZES,
        block_sizes=cache.BLOCK_SIZES,
        features=frozenset({"sliding_window", "soft_cap", "alibi", "sinks"}),
    )

    def __init__(self, *, family: str = "nvidia", buckets: Sequence[Bucket] | None = None) -> None:
        """With the tiles of a family of GPUs, and steps padded to `buckets`."""
        super().__init__()
        self._family = family
        self._buckets = buckets

    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        return self._buckets

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        return kv_codes.bytes_per_block(spec)

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> cache.KV:
        return cache.allocate(spec, num_blocks, self.device(), dtypes=self.capabilities.kv_dtypes)

    def kv_write(
        self,
        kv: cache.KV,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
    ) -> cache.KV:
        return cache.write(kv, layer, key, value, meta)

    def kv_copy(self, kv: cache.KV, src: torch.Tensor, dst: torch.Tensor) -> cache.KV:
        for part in cache.parts(kv)[:2]:
            if part is not None:
                cache.copy(part, src, dst)
        return kv

    def kv_export(self, kv: cache.KV, blocks: torch.Tensor) -> torch.Tensor:
        return cache.export_blocks(kv, blocks)

    def kv_import(self, kv: cache.KV, blocks: torch.Tensor, wire: torch.Tensor) -> cache.KV:
        return cache.import_blocks(kv, blocks, wire)

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        for spec in dict.fromkeys(specs):
            meta.plan[spec] = attention.plan_attention(meta, spec, self.to_device)
        return meta

    def attend(
        self,
        kv: cache.KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = meta.plan[spec]
        return attention.attend(kv[layer], query, meta, spec, plan, sinks, family=self._family)

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        return attention.attend_encoder(query, key, value, meta, spec, family=self._family)
