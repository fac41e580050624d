"""CpuBackend: the backend over native kernels, chosen at run time by instruction set.

Every kernel of a step is one call into the native module with addresses and sizes, given by name
(csrc_cpu/arguments.h); torch only allocates outputs and makes views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    AttentionSpec,
    Bucket,
    Capabilities,
    DeviceReport,
    Experts,
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
from portalm_backends.cpu import attention, cache
from portalm_backends.cpu.cache import CpuKV
from portalm_backends.cpu.program import NotRecordable, RecordedStep, Recorder
from portalm_backends.cpu.weights import EXACT_FORMATS, CpuWeight, WeightPacker
from portalm_backends.portable import host_memory, kv_codes, sampling
from portalm_backends.portable.backend import TorchBackend

_DTYPES = frozenset(cache.DTYPES)


class CpuBackend(TorchBackend):
    """The host's CPU, through csrc_cpu."""

    name = "cpu"
    rank = 10
    capabilities = Capabilities(
        dtypes=_DTYPES,
        kv_dtypes=cache.KV_DTYPES,
        head_sizes=cache.HEAD_SIZES,
        shared_head_sizes=cache.SHARED_HEAD_SIZES,
        shared_kv_dtypes=frozenset(cache.DTYPES),
        block_sizes=cache.BLOCK_SIZES,
        features=frozenset(
            {"sliding_window", "soft_cap", "alibi", "sinks", "shared_values", "batch_invariant"}
        ),
        quantizations=frozenset(EXACT_FORMATS),
    )

    def __init__(self) -> None:
        """Raise `BackendError` if this CPU cannot run the instruction set in PORTALM_CPU_ISA."""
        super().__init__()
        self._slopes: dict[tuple[float, ...], npt.NDArray[np.float32]] = {}
        self._experts: WeakKeyDictionary[Experts, npt.NDArray[np.int64]] = WeakKeyDictionary()
        from portalm_backends import _cpu

        try:
            _cpu.isa()
        except ValueError as error:
            raise BackendError("unsupported", str(error)) from None
        self._native: Any = _cpu
        self._dtypes = {dtype: _cpu.DTYPES[name] for name, dtype in cache.DTYPES.items()}
        """Native numbers of dtypes."""
        self._packer = WeightPacker(_cpu)

    @classmethod
    def find(cls) -> DeviceReport:
        """Report whether the native module loads, and the instruction sets it found."""
        try:
            from portalm_backends import _cpu
        except ImportError as error:
            return DeviceReport(
                is_available=False,
                summary=f"the native module is missing ({error}): install PortaLM from source "
                f"with a C++ compiler (`pip install .`), or use --device reference",
            )
        try:
            isa = _cpu.isa()
        except ValueError as error:
            return DeviceReport(is_available=False, summary=str(error))
        return DeviceReport(
            is_available=True,
            summary=f"{isa} kernels on {_cpu.num_threads()} cores of {_cpu_name()}",
            details=(
                ("instruction sets available", ", ".join(_cpu.isas())),
                ("instruction set in use", f"{isa} (set PORTALM_CPU_ISA to use another)"),
                ("usable cores", str(_cpu.usable_cores())),
            ),
        )

    # -- device and memory --------------------------------------------------------------------

    def memory(self) -> MemInfo:
        """Memory of the host, or what its container allows."""
        return host_memory.memory()

    def use_threads(self, num_threads: int) -> None:
        """Set the size of the native thread team; at most one thread per usable core."""
        usable = self._native.usable_cores()
        if num_threads > usable:
            raise BackendError(
                "unsupported",
                f"--cpu-threads is {num_threads}, but this process may use {usable} cores: "
                f"set it to at most {usable}, or leave it out",
            )
        self._native.set_num_threads(num_threads)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the bytes that became resident."""
        with host_memory.peak() as used:
            yield used

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate memory for a kernel's result."""
        out = torch.empty(shape, dtype=dtype)
        if isinstance(self._native, Recorder):
            self._native.keep(out)
        return out

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """Wrap the array without a copy: a step ends before the host reuses its buffers."""
        return torch.from_numpy(host)

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Bytes of one block's keys and values over all layers, scales included."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> CpuKV:
        """Reserve a cache; its memory is committed when blocks are first written."""
        return cache.alloc(spec, num_blocks, self._native)

    def kv_write(
        self, kv: CpuKV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> CpuKV:
        """Scatter key and value [T, H_kv, D] into their slots; heads must be contiguous."""
        self._native.kv_write(
            cache=kv.ptr + layer * kv.layer_bytes,
            **kv.shape,
            key=key.data_ptr(),
            value=value.data_ptr(),
            dtype=self._dtypes[key.dtype],
            tokens=key.shape[0],
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            slots=meta.slot_mapping.data_ptr(),
        )
        return kv

    def kv_copy(self, kv: CpuKV, src: torch.Tensor, dst: torch.Tensor) -> CpuKV:
        """Copy blocks src[i] to dst[i], int32 [N] each, in all layers."""
        src, dst = src.contiguous(), dst.contiguous()
        self._native.kv_copy(
            cache=kv.ptr,
            num_layers=kv.spec.num_layers,
            layer_bytes=kv.layer_bytes,
            block_bytes=kv.layer_bytes // kv.num_blocks,
            num_copies=len(src),
            source=src.data_ptr(),
            destination=dst.data_ptr(),
        )
        return kv

    def kv_export(self, kv: CpuKV, blocks: torch.Tensor) -> torch.Tensor:
        """Copy blocks int32 [N] into a new tensor [N, L, P, B, H_kv, D]."""
        spec = kv.spec
        block = (spec.block_size, spec.num_kv_heads, spec.head_size)
        wire = torch.empty(
            (len(blocks), spec.num_layers, spec.num_planes, *block),
            dtype=getattr(torch, spec.wire_dtype),
        )
        self._wire(kv, blocks, wire, is_export=True)
        return wire

    def kv_import(self, kv: CpuKV, blocks: torch.Tensor, wire: torch.Tensor) -> CpuKV:
        """Copy the blocks that `kv_export` returned back into the cache."""
        self._wire(kv, blocks, wire.to(getattr(torch, kv.spec.wire_dtype)), is_export=False)
        return kv

    def _wire(
        self, kv: CpuKV, blocks: torch.Tensor, wire: torch.Tensor, *, is_export: bool
    ) -> None:
        blocks, wire = blocks.to(torch.int32).contiguous(), wire.contiguous()
        self._native.kv_wire(
            cache=kv.ptr,
            **kv.shape,
            num_layers=kv.spec.num_layers,
            layer_bytes=kv.layer_bytes,
            num_wire_blocks=len(blocks),
            blocks=blocks.data_ptr(),
            wire=wire.data_ptr(),
            is_export=is_export,
        )

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Cut the step's attention into work items, once per kind of layer."""
        native = self._native
        for spec in dict.fromkeys(specs):
            meta.plan[spec] = attention.plan_attention(meta, spec, native)
        return meta

    def attend(
        self,
        kv: CpuKV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with query [T, H, D]: [T, H, out_size]; rows of pad tokens are not written."""
        plan: attention.AttentionPlan | None = meta.plan.get(spec)
        if plan is None:
            raise BackendError("shape", "attend: the step was not prepared for this attention spec")
        out = self._empty((*query.shape[:2], spec.out_size), query.dtype)
        self._native.attention(
            query=query.data_ptr(),
            out=out.data_ptr(),
            dtype=self._dtypes[query.dtype],
            query_stride=query.stride(0),
            heads=spec.num_heads,
            value_size=spec.out_size,
            cache=kv.ptr + layer * kv.layer_bytes,
            **kv.shape,
            block_table=meta.block_table.data_ptr(),
            max_blocks=meta.block_table.shape[1],
            **plan.arguments,
            scale=spec.scale,
            soft_cap=spec.soft_cap or 0.0,
            window=spec.sliding_window or 0,
            slopes=self._slopes_ptr(spec.alibi_slopes),
            sinks=0 if sinks is None else sinks.data_ptr(),
        )
        return out

    def _slopes_ptr(self, slopes: tuple[float, ...] | None) -> int:
        """Address of the slopes as float32 [H], valid as long as the backend; 0 for None."""
        if slopes is None:
            return 0
        if slopes not in self._slopes:
            self._slopes[slopes] = np.array(slopes, np.float32)
        return self._slopes[slopes].ctypes.data

    # -- layers -------------------------------------------------------------------------------

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> CpuWeight:
        """Pack a weight [N, K] into panels; the original may be freed."""
        if isinstance(weight, QuantizedWeight):
            return self._packer.pack_codes(weight, is_rounded=quantization is not None)
        return self._packer.pack(weight, quantization=quantization, for_logits=for_logits)

    def linear(
        self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [T, K] by the packed [N, K] transposed and add bias [N]: [T, N]."""
        return self._linear(x, weight, bias, x.dtype)

    def pack_heads(self, weight: torch.Tensor) -> tuple[CpuWeight, ...]:
        """Pack each head's weight [N, K] of [H, N, K]."""
        return tuple(self.pack(one) for one in weight)

    def linear_heads(self, x: torch.Tensor, weight: tuple[CpuWeight, ...]) -> torch.Tensor:
        """Multiply each head of x [T, H, K] by its packed [N, K] transposed: [T, H, N]."""
        num_tokens, num_heads, k = x.shape
        n = weight[0].n
        out = self._empty((num_tokens, num_heads, n), x.dtype)
        self._native.linear_heads(
            x=x.data_ptr(),
            dtype=self._dtypes[x.dtype],
            rows=num_tokens,
            x_stride=x.stride(0),
            head_stride=x.stride(1),
            packed=[packed.ptr for packed in weight],
            format=weight[0].format,
            n=n,
            k=k,
            out=out.data_ptr(),
        )
        return out

    def logits(self, x: torch.Tensor, weight: CpuWeight) -> torch.Tensor:
        """Multiply x [R, C] by the packed [V, C] transposed: float32 [R, V]."""
        return self._linear(x, weight, None, torch.float32)

    def _linear(
        self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if x.shape[1] != weight.k or x.stride(1) != 1:
            raise BackendError(
                "shape",
                f"linear: x must be [T, {weight.k}] with contiguous rows, not {list(x.shape)} with "
                f"strides {list(x.stride())}",
            )
        out = self._empty((x.shape[0], weight.n), dtype)
        self._native.linear(
            x=x.data_ptr(),
            x_dtype=self._dtypes[x.dtype],
            rows=x.shape[0],
            x_stride=x.stride(0),
            packed=weight.ptr,
            format=weight.format,
            n=weight.n,
            k=weight.k,
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            out_dtype=self._dtypes[dtype],
            out_stride=weight.n,
        )
        return out

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Gather rows int32 [T] of table [V, C]: [T, C]."""
        return self.take_rows(table, token_ids)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Gather rows int32 [R] of x [T, C]: [R, C]."""
        out = self._empty((len(rows), x.shape[1]), x.dtype)
        size = x.element_size()
        self._native.take_rows(
            x=x.data_ptr(),
            rows=rows.data_ptr(),
            out=out.data_ptr(),
            num_rows=len(rows),
            num_source_rows=x.shape[0],
            row_bytes=x.shape[1] * size,
            stride_bytes=x.stride(0) * size,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Compute x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
        out = self._empty(x.shape, x.dtype)
        if x.dim() != 2:
            x = x.reshape(-1, x.shape[-1])
        self._native.rms_norm(
            x=x.data_ptr(),
            residual=0,
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            total=0,
            dtype=self._dtypes[x.dtype],
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            residual_stride=0,
            eps=eps,
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (rms_norm(x + residual), x + residual)."""
        out = self._empty(x.shape, x.dtype)
        total = self._empty(x.shape, x.dtype)
        self._native.rms_norm(
            x=x.data_ptr(),
            residual=residual.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            total=total.data_ptr(),
            dtype=self._dtypes[x.dtype],
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            residual_stride=residual.stride(0),
            eps=eps,
        )
        return out, total

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
        query_out = self._empty(query.shape, query.dtype)
        key_out = self._empty(key.shape, key.dtype)
        self._native.rope(
            query=query.data_ptr(),
            key=key.data_ptr(),
            query_out=query_out.data_ptr(),
            key_out=key_out.data_ptr(),
            positions=positions.data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            dtype=self._dtypes[query.dtype],
            tokens=query.shape[0],
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_size=query.shape[2],
            rotary_dim=cos_sin.shape[1],
            query_stride=query.stride(0),
            key_stride=key.stride(0),
            is_interleaved=is_interleaved,
        )
        return query_out, key_out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Compute silu(gate) * up of gate_up [T, 2 I]: [T, I]."""
        num_rows, width = gate_up.shape
        out = self._empty((num_rows, width // 2), gate_up.dtype)
        self._native.silu_mul(
            gate_up=gate_up.data_ptr(),
            out=out.data_ptr(),
            dtype=self._dtypes[gate_up.dtype],
            rows=num_rows,
            columns=width // 2,
            stride=gate_up.stride(0),
        )
        return out

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Apply to each token its experts and sum the results by their weights: [T, C]."""
        if isinstance(self._native, Recorder):
            raise NotRecordable("torch operations choose the experts of each token")
        table = self._experts.get(experts)
        if table is None:
            pairs = zip(experts.gate_up, experts.down, strict=True)
            table = np.array([(a.ptr, a.format, b.ptr, b.format) for a, b in pairs], np.int64)
            self._experts[experts] = table
        expert_ids, expert_weights = expert_ids.contiguous(), expert_weights.contiguous()
        gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
        out = self._empty(x.shape, x.dtype)
        self._native.moe(
            x=x.data_ptr(),
            dtype=self._dtypes[x.dtype],
            tokens=x.shape[0],
            x_stride=x.stride(0),
            ids=expert_ids.data_ptr(),
            shares=expert_weights.data_ptr(),
            top_k=expert_ids.shape[1],
            experts=table.ctypes.data,
            num_experts=len(table),
            hidden=x.shape[1],
            inner=experts.down[0].k,
            gate_up_bias=0 if gate_up_bias is None else gate_up_bias.data_ptr(),
            down_bias=0 if down_bias is None else down_bias.data_ptr(),
            limit=experts.swiglu_limit or 0.0,
            alpha=experts.swiglu_alpha,
            out=out.data_ptr(),
        )
        return out

    # -- execution ----------------------------------------------------------------------------

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Return a step that is recorded as one native program, for all sizes, when first run."""
        return RecordedStep(self, super().compile(fn, bucket, example))

    @contextmanager
    def recording(self, inputs: StepInputs) -> Iterator[Recorder]:
        """Record the native calls of the step over `inputs` while the context is open."""
        native = self._native
        recorder = Recorder(native, inputs)
        self._native = recorder
        try:
            yield recorder
        finally:
            self._native = native

    # -- sampling -----------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token per row, after penalties, bias and masks are applied to the logits."""
        if isinstance(self._native, Recorder):
            self._native.end(logits)
        scores = sampling.adjust(logits, params)
        token_ids = torch.empty(len(logits), dtype=torch.int32)
        self._native.sample(
            logits=scores.data_ptr(),
            rows=scores.shape[0],
            vocab=scores.shape[1],
            stride=scores.stride(0),
            temperature=params.temperature.data_ptr(),
            top_k=params.top_k.data_ptr(),
            top_p=params.top_p.data_ptr(),
            min_p=params.min_p.data_ptr(),
            seed=params.seed.data_ptr(),
            position=params.position.data_ptr(),
            out=token_ids.data_ptr(),
        )
        return sampling.finish(token_ids, logits, params)


def _cpu_name() -> str:
    """Model name of the CPU, or its architecture if the system does not report a name."""
    import platform
    from pathlib import Path

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
