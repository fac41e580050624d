"""GpuBackend with plain torch operations that a graph can record, for tests not about kernels."""

from __future__ import annotations

import torch

from portalm.backend import (
    KV,
    AttentionSpec,
    DeviceReport,
    KVSpec,
    SampleOutput,
    SampleParams,
    StepMeta,
)
from portalm_backends.gpu_common.archs import CUDA
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.kernels.unpack import unpack_plainly
from portalm_backends.portable.backend import TorchBackend


class PlainGpu(GpuBackend):
    """A GPU backend whose steps are fast on the CPU and never read a value on the host."""

    name = "plain"
    archs = CUDA
    native_name = "none"

    prepare = TorchBackend.prepare
    _pack = TorchBackend._pack
    linear = TorchBackend.linear
    logits = TorchBackend.logits
    rms_norm = TorchBackend.rms_norm
    add_rms_norm = TorchBackend.add_rms_norm
    rope = TorchBackend.rope
    rope_kv_write = TorchBackend.rope_kv_write
    silu_mul = TorchBackend.silu_mul
    moe = TorchBackend.moe
    kv_copy = TorchBackend.kv_copy
    _unpack = staticmethod(unpack_plainly)

    def _sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        return TorchBackend.sample(self, logits, params)

    @classmethod
    def find(cls) -> DeviceReport:
        return DeviceReport(is_available=True, summary="a fake device")

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        numbers = spec.num_layers * 2 * spec.block_size * spec.num_kv_heads * spec.head_size
        return numbers * int(getattr(torch, spec.dtype).itemsize)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        shape = (spec.num_layers, 2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        return torch.full(shape, float("nan"), dtype=getattr(torch, spec.dtype))

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        slots = meta.slot_mapping.long()
        kv[layer, 0].flatten(0, 1)[slots] = key.to(kv.dtype)
        kv[layer, 1].flatten(0, 1)[slots] = value.to(kv.dtype)
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
        """Attend each token to all slots of its request's table, then mask later positions."""
        num_tokens = len(query)
        token = torch.arange(num_tokens, dtype=torch.int32)
        request = torch.searchsorted(meta.query_start_loc[1:], token, right=True)
        request = request.clamp(max=len(meta.seq_lens) - 1)
        tables = meta.block_table[request].long()  # [T, MB]
        key, value = (
            kv[layer, i][tables].flatten(1, 2).float() for i in range(2)
        )  # [T, MB B, H_kv, D]
        position = torch.arange(key.shape[1], dtype=torch.int32)
        is_seen = position <= meta.positions[:, None]  # [T, MB B]
        key, value = (x.masked_fill(~is_seen[:, :, None, None], 0.0) for x in (key, value))
        group = spec.num_heads // spec.num_kv_heads
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        scores = torch.einsum("thd,tkhd->thk", query.float(), key) * spec.scale
        scores = scores.masked_fill(~is_seen[:, None], float("-inf"))
        return torch.einsum("thk,tkhd->thd", scores.softmax(dim=-1), value).to(query.dtype)
