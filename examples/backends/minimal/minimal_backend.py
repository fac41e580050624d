"""A complete backend: attention and the KV cache in plain torch, everything else inherited."""

import torch

from portalm.backend import AttentionSpec, Capabilities, DeviceReport, KVSpec, MemInfo, StepMeta
from portalm_backends.portable import host_memory
from portalm_backends.portable.backend import TorchBackend


class MinimalBackend(TorchBackend):
    """The host CPU, in float32."""

    api_version = (1, 0)
    name = "minimal"
    rank = -1  # never chosen by --device auto
    capabilities = Capabilities(
        dtypes=frozenset({"float32"}),
        kv_dtypes=frozenset({"float32"}),
    )

    @classmethod
    def find(cls) -> DeviceReport:
        return DeviceReport(is_available=True, summary="tutorial backend on the host CPU")

    def memory(self) -> MemInfo:
        return host_memory.memory()

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * spec.head_size * 4

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> torch.Tensor:
        block = (spec.block_size, spec.num_kv_heads, spec.head_size)
        return torch.empty((spec.num_layers, 2, num_blocks, *block))  # 2: keys, values

    def kv_write(
        self, kv: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> torch.Tensor:
        slots = meta.slot_mapping.long()  # slot = block * block_size + offset
        kv[layer, 0].flatten(0, 1)[slots] = key
        kv[layer, 1].flatten(0, 1)[slots] = value
        return kv

    def attend(
        self,
        kv: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.zeros_like(query)
        group_size = spec.num_heads // spec.num_kv_heads
        for i, length in enumerate(meta.host_seq_lens.tolist()):
            start, end = meta.host_query_start_loc[i : i + 2].tolist()
            blocks = meta.block_table[i].long()
            key, value = (
                kv[layer, side, blocks].flatten(0, 1)[:length].repeat_interleave(group_size, dim=1)
                for side in (0, 1)
            )  # [length, H, D] each
            scores = torch.einsum("qhd,khd->hqk", query[start:end], key) * spec.scale
            positions = torch.arange(length - (end - start), length)
            is_future = torch.arange(length) > positions[:, None]
            probs = scores.masked_fill(is_future, float("-inf")).softmax(dim=-1)
            out[start:end] = torch.einsum("hqk,khd->qhd", probs, value)
        return out
