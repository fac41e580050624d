"""GpuBackend: the seam over torch and Triton, the same for every maker's GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    AttentionSpec,
    Bucket,
    Capabilities,
    Experts,
    HostFuture,
    KVSpec,
    MemInfo,
    QuantizedWeight,
    SampleOutput,
    SampleParams,
    StepFn,
    StepInputs,
    StepMeta,
)
from portalm.errors import BackendError, Unsupported
from portalm_backends.gpu_common import memory, native
from portalm_backends.gpu_common.archs import Arch
from portalm_backends.gpu_common.device import Gpu, error_kind
from portalm_backends.gpu_common.graph import Graphs, decode_buckets
from portalm_backends.gpu_common.transfers import Transfers
from portalm_backends.gpu_common.weights import (
    FP8,
    QUANTIZATIONS,
    ExpertWeights,
    FewBitWeight,
    GpuWeight,
    pack,
    together,
)
from portalm_backends.portable import kv_codes
from portalm_backends.portable.backend import TorchBackend

if TYPE_CHECKING:
    from portalm_backends.gpu_common import attention, cache
    from portalm_backends.gpu_common.kernels import (
        fp8,
        linear,
        moe,
        norms,
        rope,
        sampling,
        silu_mul,
    )

logger = logging.getLogger(__name__)


class GpuBackend(TorchBackend):
    """One GPU: steps are enqueued, captured as graphs, and answered a step late."""

    archs: dict[str, Arch]
    """Architectures that this backend knows, by name."""
    native_name: str
    """Of the module with native kernels, where they were built: cuda or rocm."""

    def __init__(self, gpu: Gpu) -> None:
        """On `gpu`, which is started. Raises `Unsupported` for one that is not known."""
        super().__init__()
        _import_kernels()
        self.arch = known_arch(gpu.arch, self.archs)
        self._fp8 = fp8.dtype_of(gpu.handle)
        self.capabilities = capabilities(self.arch, has_fp8_products=self._fp8 is not None)
        self._gpu = gpu
        self._native: native.NativeKernels | None = None
        if gpu.runs_native and native.missing(self.native_name, gpu.arch) is None:
            self._native = native.load(self.native_name, gpu.arch)
        self._workspaces: dict[AttentionSpec, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of the native decode attention: its layers share one, and captured steps read it."""
        self._experts: WeakKeyDictionary[Experts, tuple[ExpertWeights | None, ...]]
        self._experts = WeakKeyDictionary()
        """Of each layer, gate and up, then down."""
        self._family = attention.family_of(self.arch.name)
        self._transfers = Transfers(gpu)
        self._graphs = Graphs(gpu, self._transfers, self._sample)

    # -- device and memory --------------------------------------------------------------------

    def device(self) -> torch.device:
        """The GPU."""
        return self._gpu.handle

    def memory(self) -> MemInfo:
        """The GPU's own; waits for it."""
        return memory.memory(self._gpu)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Bytes of live tensors, as torch's allocator counts them."""
        with memory.peak(self._gpu) as used:
            yield used

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy, in order with the steps; the host may write its own again at once."""
        return self._transfers.upload([host])[0]

    def to_device_all(self, hosts: Sequence[npt.NDArray[np.generic]]) -> list[torch.Tensor]:
        """Copies in one transfer."""
        return self._transfers.upload(hosts)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """A copy on a stream of its own, behind what is enqueued now."""
        return self._transfers.download(x)

    @contextmanager
    def device_errors(self) -> Iterator[None]:
        """Within it what torch raises for the device comes as `BackendError`.

        Where memory ran out, what torch's allocator keeps for later is given back first.
        """
        try:
            yield
        except BackendError:
            raise
        except RuntimeError as error:
            kind = error_kind(error)
            if kind is None:
                raise
            if kind == "oom":
                self._gpu.empty_cache()
            raise BackendError(kind, str(error)) from error

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Keys and values of one block over all layers."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> cache.KV:
        """One tensor, [L, NB, H_kv, 2, B, D], with one of scales beside it for codes."""
        return cache.allocate(spec, num_blocks, self.device())

    def kv_write(
        self,
        kv: cache.KV,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
    ) -> cache.KV:
        """Scatter [T, H_kv, D] each into their slots; rows may lie apart, heads may not."""
        if self._native is None or isinstance(kv, cache.ScaledKV) or not len(key):
            return cache.write(kv, layer, key, value, meta)
        if not self._native.writes(kv, key):
            return cache.write(kv, layer, key, value, meta)
        self._native.kv_write(kv[layer], key, value, meta.slot_mapping)
        return kv

    def rope_kv_write(
        self,
        kv: cache.KV,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[cache.KV, torch.Tensor]:
        """`rope`, then `kv_write`; in one launch but for codes, whose scale is of a whole head."""
        if isinstance(kv, cache.ScaledKV):
            return super().rope_kv_write(
                kv, layer, query, key, value, meta, cos_sin, is_interleaved=is_interleaved
            )
        rotary_dim = cos_sin.shape[1]
        alike = rotary_dim if is_interleaved else rotary_dim // 2
        if self._native is not None and len(key) and self._native.writes(kv, key, alike):
            rotated = self._native.rope_kv_write(
                kv[layer], query, key, value, meta.slot_mapping, meta.positions, cos_sin,
                is_interleaved=is_interleaved,
            )  # fmt: skip
            return kv, rotated
        rotated = cache.rotate_and_write(
            kv, layer, query, key, value, meta, cos_sin, is_interleaved=is_interleaved
        )
        return kv, rotated

    def kv_copy(self, kv: cache.KV, src: torch.Tensor, dst: torch.Tensor) -> cache.KV:
        """Blocks src[i] to dst[i], int32 [N] each, over all layers, in one launch, or two."""
        copy = cache.copy if self._native is None or not len(src) else self._native.kv_copy
        numbers, scales, _ = cache.parts(kv)
        copy(numbers, src, dst)
        if scales is not None:
            copy(scales, src, dst)
        return kv

    def kv_export(self, kv: cache.KV, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks int32 [N] as [N, L, 2, B, H_kv, D] on the host; waits for it."""
        wire = cache.export_blocks(kv, blocks)
        return torch.from_numpy(self.to_host(wire.view(torch.uint8)).result()).view(wire.dtype)

    def kv_import(self, kv: cache.KV, blocks: torch.Tensor, wire: torch.Tensor) -> cache.KV:
        """The inverse of `kv_export`; a wire of another dtype is converted."""
        return cache.import_blocks(kv, blocks, wire)

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """A list of work for each kind of layer, on the device."""
        for spec in dict.fromkeys(specs):
            plan = meta.plan[spec] = attention.plan_attention(
                meta,
                spec,
                self.to_device,
                num_programs=self._gpu.num_cores * 2,
                has_native=self._native is not None,
            )
            if plan.stretches is not None and spec not in self._workspaces:
                most = len(plan.stretches)
                self._workspaces[spec] = native.NativeKernels.decode_workspace(
                    spec, most, most, self.device()
                )
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
        """Attention of [T, H, D] over each request's context: one launch, or two and a merge."""
        plan = meta.plan[spec]
        if (
            self._native is None
            or plan.stretches is None
            or isinstance(kv, cache.ScaledKV)
            or not self._native.decodes(kv, query)
        ):
            return attention.attend(kv[layer], query, meta, spec, plan, sinks, family=self._family)
        slopes = None
        if spec.alibi_slopes is not None:
            slopes = attention.slopes_of(spec.alibi_slopes, query.device)
        return self._native.decode_attention(
            kv[layer], query, meta.block_table, meta.seq_lens, plan.stretches,
            self._workspaces[spec], spec, slopes, sinks,
        )  # fmt: skip

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attention of [T, H, D] within each request."""
        return attention.attend_encoder(query, key, value, meta, spec, family=self._family)

    # -- layers -------------------------------------------------------------------------------

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> GpuWeight:
        """A linear weight [N, K] as the kernels read it; what is rounded is rounded on the GPU."""
        return pack(
            weight,
            self.device(),
            quantization=quantization,
            for_logits=for_logits,
            fp8=self._fp8,
        )

    def linear(
        self, x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, K] times the packed [N, K] transposed, plus bias [N]: [T, N]."""
        return linear.linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: torch.Tensor | FewBitWeight) -> torch.Tensor:
        """x [R, C] times the packed [V, C] transposed: float32 [R, V]."""
        return linear.logits(x, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
        return norms.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        return norms.add_rms_norm(x, residual, weight, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias, rounded to x's dtype once."""
        return norms.layer_norm(x, weight, bias, eps)

    def rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [T, H, D] and key [T, H_kv, D] rotated by positions int32 [T]."""
        return rope.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        return silu_mul.silu_mul(gate_up)

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Each expert on the tokens that chose it, all in four launches, six of float8: [T, C].

        Where the experts are packed unlike each other, every expert on every token.
        """
        if experts not in self._experts:
            self._experts[experts] = self._together(experts)
        gate_up, down = self._experts[experts]
        if gate_up is None or down is None:
            return super().moe(x, expert_ids, expert_weights, experts)
        return moe.moe(x, expert_ids, expert_weights, experts, gate_up, down, family=self._family)

    def _together(self, experts: Experts) -> tuple[ExpertWeights | None, ...]:
        found = tuple(together(many, self.to_device) for many in (experts.gate_up, experts.down))
        if None in found and not any(None in others for others in self._experts.values()):
            logger.warning(
                "a layer's experts differ in how they are packed: every one is computed for every "
                "token, which is much slower than experts of one kind"
            )
        return found

    # -- execution ----------------------------------------------------------------------------

    def buckets(self, max_tokens: int, max_requests: int, max_blocks: int) -> Sequence[Bucket]:
        """Decodes only: a step with prompts in it computes longer than it takes to enqueue."""
        return decode_buckets(max_requests, max_blocks)

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """A graph for `bucket`, captured by the first call, for every kind of sampling.

        Without a bucket, `fn` itself. Raises `BackendError` once sealed, but for a bucket whose
        graph is there.
        """
        if bucket is None:
            self._graphs.require_open(bucket)
            return fn
        return self._graphs.step(fn, bucket)

    @contextmanager
    def seal(self) -> Iterator[None]:
        """Within it nothing is captured."""
        self._graphs.is_sealed = True
        try:
            yield
        finally:
            self._graphs.is_sealed = False

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """One token from each row of float32 logits [R, V]."""
        if self._graphs.draw is not None:
            return self._graphs.draw(logits)
        return self._sample(logits, params)

    def _sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        if self._native is None or not len(logits):
            return sampling.sample(logits, params)
        return self._native.sample(logits, params)


def _import_kernels() -> None:
    """Triton is imported when a GPU is started, not where one is only looked for."""
    global attention, cache, fp8, linear, moe, norms, rope, sampling, silu_mul
    from portalm_backends.gpu_common import attention, cache
    from portalm_backends.gpu_common.kernels import (
        fp8,
        linear,
        moe,
        norms,
        rope,
        sampling,
        silu_mul,
    )


def known_arch(name: str, archs: dict[str, Arch]) -> Arch:
    """The architecture called so; `Unsupported` with those there are."""
    if name not in archs:
        known = ", ".join(f"{arch.name} ({arch.product})" for arch in archs.values())
        raise Unsupported(f"no kernels for {name}; there are for {known}")
    return archs[name]


def capabilities(arch: Arch, *, has_fp8_products: bool) -> Capabilities:
    """What this folder's kernels do on any architecture, and torch's products on this one."""
    return Capabilities(
        device=f"{arch.name} ({arch.product})",
        dtypes=cache.DTYPES,
        kv_dtypes=cache.KV_DTYPES,
        head_sizes=cache.HEAD_SIZES,
        shared_head_sizes=cache.SHARED_HEAD_SIZES,
        shared_kv_dtypes=cache.DTYPES,
        block_sizes=cache.BLOCK_SIZES,
        quantizations=QUANTIZATIONS | ({FP8} if has_fp8_products else set()),
        features=frozenset({"sliding_window", "soft_cap", "alibi", "sinks", "shared_values"}),
        measures_memory=True,
        max_steps_in_flight=2,
    )
