"""GpuBackend: the backend for GPUs of every maker, built on torch and Triton."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from portalm.errors import BackendError
from portalm_backends.gpu_common import memory, native
from portalm_backends.gpu_common.archs import Arch, find_arch
from portalm_backends.gpu_common.buckets import step_buckets
from portalm_backends.gpu_common.device import Gpu
from portalm_backends.gpu_common.errors import backend_error
from portalm_backends.gpu_common.graph import Graphs
from portalm_backends.gpu_common.late_compiles import LateCompiles
from portalm_backends.gpu_common.providers import ATTENTION
from portalm_backends.gpu_common.step_uploads import StepUploads
from portalm_backends.gpu_common.transfers import Transfers
from portalm_backends.gpu_common.weights import (
    FP8,
    QUANTIZATIONS,
    ExpertWeights,
    Fp8Weight,
    GpuWeight,
    PackedQuantized,
    group_experts,
    pack,
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
        unpack,
    )
    from portalm_backends.gpu_common.providers import check as provider_check

logger = logging.getLogger(__name__)


class GpuBackend(TorchBackend):
    """One GPU: steps run asynchronously, and decodes are captured as graphs."""

    archs: dict[str, Arch]
    """Supported architectures by name."""
    native_name: str
    """Vendor of the native kernels, if they were built: cuda or rocm."""

    def __init__(self, gpu: Gpu) -> None:
        """Use `gpu`, which is already started.

        Raises:
            Unsupported: its architecture is not supported, see `find_arch`.
        """
        super().__init__()
        _import_kernels()
        self.arch = find_arch(gpu.arch, self.archs)
        self._fp8 = fp8.dtype_of(gpu.handle)
        self._fp8_widths: set[int] = set()
        """Columns of float8 weights: such activations are quantized where they are made."""
        self.capabilities = capabilities(self.arch, has_fp8_products=self._fp8 is not None)
        self._gpu = gpu
        self._native: native.NativeKernels | None = None
        if gpu.runs_native and native.missing(self.native_name, gpu.arch) is None:
            self._native = native.load(self.native_name, gpu.arch)
        self._workspaces: dict[AttentionSpec, tuple[torch.Tensor, torch.Tensor]] = {}
        """Workspace of the native decode attention by kind of layer; captured steps use it too."""
        self._experts: WeakKeyDictionary[Experts, tuple[ExpertWeights | None, ...]]
        self._experts = WeakKeyDictionary()
        """Grouped weights of each layer's experts: gate and up, then down."""
        self._family = self.arch.family
        self._num_dies = self.arch.num_dies(gpu.num_cores)
        self._prefill = provider_check.PrefillProviders(
            ATTENTION,
            self.arch.name,
            lambda kind: provider_check.OwnAttention(
                kind, family=self._family, num_programs=self._gpu.num_cores * 2
            ),
            gpu.synchronize,
        )
        self._transfers = Transfers(gpu)
        self.late_compiles = LateCompiles()
        self._uploads = StepUploads(gpu, self._unpack)
        self._graphs = Graphs(gpu, self._transfers, self._uploads, self._sample)

    # -- device and memory --------------------------------------------------------------------

    def device(self) -> torch.device:
        """The GPU."""
        return self._gpu.handle

    def memory(self) -> MemInfo:
        """Total and free memory of the GPU; waits until the GPU is idle."""
        return memory.memory(self._gpu)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the peak of live tensors in bytes above the start."""
        with memory.peak(self._gpu) as used:
            yield used

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy to the device, in order with the steps.

        The caller may reuse `host` when this returns, or within `step_uploads` when that ends.
        """
        if self._uploads.is_open:
            added = self._uploads.add(host)
            if added is not None:
                return added
        return self._transfers.upload([host])[0]

    def step_uploads(self) -> AbstractContextManager[None]:
        """Context whose uploads are one transfer, to addresses that the next context reuses."""
        return self._uploads.open()

    def block_table(
        self,
        block_ids: npt.NDArray[np.int32],
        block_starts: npt.NDArray[np.int32],
        width: int,
    ) -> torch.Tensor:
        """Rows of the table that stays on the device, int32 [S, width].

        Only the block ids are uploaded; what follows them in a row is left over.
        """
        if self._uploads.is_open:
            return self._uploads.add_table(block_ids, block_starts, width)
        return super().block_table(block_ids, block_starts, width)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Start copying to the host on a separate stream, after the work enqueued so far."""
        return self._transfers.download(x)

    @contextmanager
    def device_errors(self) -> Iterator[None]:
        """Re-raise errors of the device and of Triton inside this context as `BackendError`.

        On out of memory, the memory that torch's allocator caches is released first.
        """
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            translated = backend_error(error)
            if translated is None:
                raise
            if translated.kind == "oom":
                self._gpu.empty_cache()
            raise translated from error

    def _unpack(
        self,
        packed: torch.Tensor,
        arrays: torch.Tensor,
        table: torch.Tensor | None,
        num_words: int,
        ids_at: int,
        starts: npt.NDArray[np.int32],
    ) -> None:
        unpack.unpack(packed, arrays, table, num_words, ids_at, starts)

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Bytes of one block's keys and values over all layers, scales included."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> cache.KV:
        """Allocate one tensor, [L, NB, H_kv, 2, B, D], and a second for the scales of codes."""
        return cache.allocate(spec, num_blocks, self.device())

    def kv_write(
        self,
        kv: cache.KV,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
    ) -> cache.KV:
        """Write key and value, [T, H_kv, D] each, into their slots."""
        return cache.write(kv, layer, key, value, meta)

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
        """Apply `rope` and `kv_write` in one launch.

        8-bit caches take two: a scale needs all values of the rotated head.
        """
        if isinstance(kv, cache.ScaledKV):
            return super().rope_kv_write(
                kv, layer, query, key, value, meta, cos_sin, is_interleaved=is_interleaved
            )
        rotated = cache.rotate_and_write(
            kv, layer, query, key, value, meta, cos_sin, is_interleaved=is_interleaved
        )
        return kv, rotated

    def kv_copy(self, kv: cache.KV, src: torch.Tensor, dst: torch.Tensor) -> cache.KV:
        """Copy blocks src[i] to dst[i], int32 [N] each, in all layers, in one or two launches."""
        numbers, scales, _ = cache.parts(kv)
        cache.copy(numbers, src, dst)
        if scales is not None:
            cache.copy(scales, src, dst)
        return kv

    def kv_export(self, kv: cache.KV, blocks: torch.Tensor) -> torch.Tensor:
        """Copy blocks int32 [N] to the host as [N, L, 2, B, H_kv, D]; wait for the copy."""
        wire = cache.export_blocks(kv, blocks)
        return torch.from_numpy(self.to_host(wire.view(torch.uint8)).result()).view(wire.dtype)

    def kv_import(self, kv: cache.KV, blocks: torch.Tensor, wire: torch.Tensor) -> cache.KV:
        """Write exported blocks into blocks int32 [N]; another dtype is converted."""
        return cache.import_blocks(kv, blocks, wire)

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Plan the attention of each kind of layer, and copy the plans to the device."""
        for spec in dict.fromkeys(specs):
            plan = meta.plan[spec] = attention.plan_attention(
                meta,
                spec,
                self.to_device,
                num_programs=self._gpu.num_cores * 2,
                has_native=self._native is not None,
            )
            if plan.native_items is not None and spec not in self._workspaces:
                most = len(plan.native_items)
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
        """Attention of query [T, H, D] over each request's context, in one to four launches.

        Steps that are not captured have long prompts: an optional package may compute them.
        """
        plan = meta.plan[spec]
        if plan.wide is not None and meta.bucket is None and isinstance(kv, torch.Tensor):
            out = self._prefill.attend(
                kv[layer], query, meta, spec,
                to_device=self.to_device, may_check=not self._graphs.is_sealed,
            )  # fmt: skip
            if out is not None:
                return out
        if (
            self._native is None
            or plan.native_items is None
            or isinstance(kv, cache.ScaledKV)
            or not self._native.decodes(kv, query)
        ):
            return attention.attend(
                kv[layer], query, meta, spec, plan, sinks,
                family=self._family, num_dies=self._num_dies,
            )  # fmt: skip
        slopes = None
        if spec.alibi_slopes is not None:
            slopes = attention.slopes_of(spec.alibi_slopes, query.device)
        return self._native.decode_attention(
            kv[layer], query, meta.block_table, meta.seq_lens, plan.native_items,
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
        """Attention of query [T, H, D] to all tokens of the same request."""
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
        packed = pack(
            weight,
            self.device(),
            quantization=quantization,
            for_logits=for_logits,
            fp8=self._fp8,
        )
        if isinstance(packed, Fp8Weight):
            self._fp8_widths.add(packed.values.shape[1])
        return packed

    def _fp8_of(self, width: int, dtype: torch.dtype) -> torch.dtype | None:
        """The float8 dtype to quantize activations [T, width] to where they are made, or None."""
        return self._fp8 if width in self._fp8_widths and dtype == torch.bfloat16 else None

    def linear(
        self, x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [T, K] with the packed [N, K] transposed; add bias [N]: [T, N]."""
        return linear.linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: torch.Tensor | PackedQuantized) -> torch.Tensor:
        """Multiply x [R, C] with the packed [V, C] transposed: float32 [R, V]."""
        return linear.logits(x, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
        fp8_dtype = self._fp8_of(x.shape[-1], x.dtype) if x.dim() == 2 else None
        return norms.rms_norm(x, weight, eps, fp8_dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        fp8_dtype = self._fp8_of(x.shape[-1], x.dtype) if x.dim() == 2 else None
        return norms.add_rms_norm(x, residual, weight, eps, fp8_dtype)

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
        """Rotate query [T, H, D] and key [T, H_kv, D] by positions int32 [T]."""
        return rope.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        return silu_mul.silu_mul(gate_up, self._fp8_of(gate_up.shape[1] // 2, gate_up.dtype))

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Compute each expert on its tokens: [T, C]; four launches, or six in float8.

        If the experts of a layer are packed differently, every expert is computed on every token.
        """
        if experts not in self._experts:
            self._experts[experts] = self._group(experts)
        gate_up, down = self._experts[experts]
        if gate_up is None or down is None:
            return super().moe(x, expert_ids, expert_weights, experts)
        return moe.moe(
            x, expert_ids, expert_weights, experts, gate_up, down,
            family=self._family, num_dies=self._num_dies,
        )  # fmt: skip

    def _group(self, experts: Experts) -> tuple[ExpertWeights | None, ...]:
        weights = (experts.gate_up, experts.down)
        grouped = tuple(group_experts(many, self.to_device) for many in weights)
        if None in grouped and not any(None in others for others in self._experts.values()):
            logger.warning(
                "the experts of a layer differ in format, shape or dtype, so every expert is "
                "computed for every token, which is much slower: quantize all experts of a layer "
                "in the same way"
            )
        return grouped

    # -- execution ----------------------------------------------------------------------------

    def buckets(self, max_tokens: int, max_requests: int, max_blocks: int) -> Sequence[Bucket]:
        """Decodes, and mixed steps of few tokens: see buckets.py."""
        self._uploads.reserve_table(max_requests, max_blocks)
        return step_buckets(max_tokens, max_requests, max_blocks)

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Return a graph for `bucket`, captured by its first call, for every kind of sampling.

        Without a bucket, return `fn` itself.

        Raises:
            BackendError: the backend is sealed, and `bucket` has no graph yet.
        """
        if bucket is None:
            self._graphs.require_open(bucket)
            return fn
        return self._graphs.step(fn, bucket)

    @contextmanager
    def seal(self) -> Iterator[None]:
        """Context in which nothing may be captured, and compilations of kernels are counted."""
        self._graphs.is_sealed = True
        try:
            with self.late_compiles.counted():
                yield
        finally:
            self._graphs.is_sealed = False

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token from each row of float32 logits [R, V]."""
        if self._graphs.sample_override is not None:
            return self._graphs.sample_override(logits)
        return self._sample(logits, params)

    def _sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        return sampling.sample(logits, params)


def _import_kernels() -> None:
    """Import Triton only when a GPU is started, not when `find` reports one."""
    global attention, cache, fp8, linear, moe, norms, provider_check, rope, sampling, silu_mul
    global unpack
    from portalm_backends.gpu_common import attention, cache
    from portalm_backends.gpu_common.kernels import (
        fp8,
        linear,
        moe,
        norms,
        rope,
        sampling,
        silu_mul,
        unpack,
    )
    from portalm_backends.gpu_common.providers import check as provider_check


def capabilities(arch: Arch, *, has_fp8_products: bool) -> Capabilities:
    """Capabilities of the kernels, which are the same on all architectures, and of torch's fp8."""
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
