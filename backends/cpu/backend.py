"""CpuBackend: the seam over native kernels, chosen at run time by instruction set.

Every kernel of the step is one call into `_cpu` with addresses and sizes: what a call needs to know
of a tensor is asked once, and nothing in the step runs through torch but the allocation of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from portalm_backends.cpu.cache import CODES, CpuKV
from portalm_backends.cpu.memory import Arena
from portalm_backends.cpu.program import NotRecordable, RecordedStep, Recorder
from portalm_backends.portable import host_memory, kv_codes, sampling
from portalm_backends.portable.backend import TorchBackend

_DTYPES = frozenset(cache.DTYPES)
_EXACT_FORMATS = {
    "int8": 6, "int4": 7, "int4_min": 8, "int8_g16": 9, "int8_min": 11, "int8_g16_min": 12
}  # fmt: skip
"""Numbers of a checkpoint's own codes (Format in csrc_cpu/kernels.h): activations of 15 bits."""
_ROUNDED_FORMATS = _EXACT_FORMATS | {"int8": 3, "int4": 4, "int4_min": 5}
"""Numbers of what a weight is rounded to: activations of 8 bits, where that is faster."""


_BLOCKS = 10
"""Number of bfloat16 as integers, where those are faster. Logits decide between tokens: exact."""


@dataclass(slots=True, frozen=True)
class CpuWeight:
    """A linear weight [N, K] in panels of rows (csrc_cpu/linear.h)."""

    data: torch.Tensor
    ptr: int
    code: int
    n: int
    k: int


class CpuBackend(TorchBackend):
    """The host's CPU through csrc_cpu."""

    name = "cpu"
    rank = 10
    capabilities = Capabilities(
        dtypes=_DTYPES,
        kv_dtypes=frozenset(cache.KV_CODES),
        head_sizes=cache.HEAD_SIZES,
        shared_head_sizes=cache.SHARED_HEAD_SIZES,
        shared_kv_dtypes=frozenset(cache.DTYPES),
        block_sizes=cache.BLOCK_SIZES,
        features=frozenset(
            {"sliding_window", "soft_cap", "alibi", "sinks", "shared_values", "batch_invariant"}
        ),
        quantizations=frozenset(_EXACT_FORMATS),
    )

    def __init__(self) -> None:
        """Raises `BackendError` if PORTALM_CPU_ISA names what this CPU cannot run."""
        super().__init__()
        self._slopes: dict[tuple[float, ...], npt.NDArray[np.float32]] = {}
        self._experts: WeakKeyDictionary[Experts, npt.NDArray[np.int64]] = WeakKeyDictionary()
        from portalm_backends import _cpu

        try:
            _cpu.isa()
        except ValueError as error:
            raise BackendError("unsupported", str(error)) from None
        self._native: Any = _cpu
        self._weights = Arena("the weights")

    @classmethod
    def find(cls) -> DeviceReport:
        """Whether the native module loads, and what it found."""
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
                ("instruction sets that run here", ", ".join(_cpu.isas())),
                ("instruction set in use", f"{isa} (PORTALM_CPU_ISA chooses another)"),
                ("usable cores", str(_cpu.usable_cores())),
            ),
        )

    # -- device and memory --------------------------------------------------------------------

    def memory(self) -> MemInfo:
        """The host's, or what its container allows."""
        return host_memory.memory()

    def use_threads(self, num_threads: int) -> None:
        """The native team's; more than the usable cores would only wait for each other."""
        usable = self._native.usable_cores()
        if num_threads > usable:
            raise BackendError(
                "unsupported",
                f"{num_threads} threads were asked for and this process may use {usable} cores: "
                f"leave --cpu-threads out, or give it at most {usable}",
            )
        self._native.set_num_threads(num_threads)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Bytes that became resident."""
        with host_memory.peak() as used:
            yield used

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a kernel's result."""
        out = torch.empty(shape, dtype=dtype)
        if isinstance(self._native, Recorder):
            self._native.keep(out)
        return out

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """The array itself: a step is over before the host writes its buffers again."""
        return torch.from_numpy(host)

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Keys and values of one block over all layers."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> CpuKV:
        """Reserved, not committed, until blocks are written."""
        return cache.alloc(spec, num_blocks)

    def kv_write(
        self, kv: CpuKV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> CpuKV:
        """Scatter [T, H_kv, D] each into their slots; rows may lie apart, heads may not."""
        self._native.kv_write(
            kv.ptr + layer * kv.layer_bytes,
            *kv.shape,
            key.data_ptr(),
            value.data_ptr(),
            CODES[key.dtype],
            key.shape[0],
            key.stride(0),
            value.stride(0),
            meta.slot_mapping.data_ptr(),
        )
        return kv

    def kv_copy(self, kv: CpuKV, src: torch.Tensor, dst: torch.Tensor) -> CpuKV:
        """Blocks src[i] to dst[i], int32 [N] each, over all layers."""
        src, dst = src.contiguous(), dst.contiguous()
        self._native.kv_copy(
            kv.ptr,
            kv.spec.num_layers,
            kv.layer_bytes,
            kv.layer_bytes // kv.num_blocks,
            len(src),
            src.data_ptr(),
            dst.data_ptr(),
        )
        return kv

    def kv_export(self, kv: CpuKV, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks int32 [N] as [N, L, P, B, H_kv, D]."""
        spec = kv.spec
        block = (spec.block_size, spec.num_kv_heads, spec.head_size)
        wire = torch.empty(
            (len(blocks), spec.num_layers, spec.num_planes, *block),
            dtype=getattr(torch, spec.wire_dtype),
        )
        self._wire(kv, blocks, wire, is_export=True)
        return wire

    def kv_import(self, kv: CpuKV, blocks: torch.Tensor, wire: torch.Tensor) -> CpuKV:
        """The inverse of `kv_export`."""
        self._wire(kv, blocks, wire.to(getattr(torch, kv.spec.wire_dtype)), is_export=False)
        return kv

    def _wire(
        self, kv: CpuKV, blocks: torch.Tensor, wire: torch.Tensor, *, is_export: bool
    ) -> None:
        blocks, wire = blocks.to(torch.int32).contiguous(), wire.contiguous()
        self._native.kv_wire(
            kv.ptr,
            *kv.shape,
            kv.spec.num_layers,
            kv.layer_bytes,
            len(blocks),
            blocks.data_ptr(),
            wire.data_ptr(),
            is_export,
        )

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Cut the step's attention into work items, once for every kind of layer."""
        num_threads = self._native.num_threads()
        for spec in dict.fromkeys(specs):
            meta.plan[spec] = attention.plan_attention(meta, spec, num_threads)
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
        """Attention of [T, H, D]; rows of pad tokens are not written."""
        plan: attention.AttentionPlan | None = meta.plan.get(spec)
        if plan is None:
            raise BackendError("shape", "attend: the step was not prepared for this attention")
        out = self._empty((*query.shape[:2], spec.out_size), query.dtype)
        self._native.attention(
            query.data_ptr(),
            out.data_ptr(),
            CODES[query.dtype],
            query.stride(0),
            spec.num_heads,
            spec.out_size,
            kv.ptr + layer * kv.layer_bytes,
            *kv.shape,
            meta.block_table.data_ptr(),
            meta.block_table.shape[1],
            plan.items_ptr,
            plan.num_items,
            plan.partials_ptr,
            plan.counters_ptr,
            spec.scale,
            spec.soft_cap or 0.0,
            spec.sliding_window or 0,
            self._slopes_ptr(spec.alibi_slopes),
            0 if sinks is None else sinks.data_ptr(),
        )
        return out

    def _slopes_ptr(self, slopes: tuple[float, ...] | None) -> int:
        """Address of float32 [H] that stays where it is; 0 for none."""
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
        """A weight [N, K] in panels; the original may be dropped."""
        n, k = weight.shape
        if isinstance(weight, QuantizedWeight):
            formats = _EXACT_FORMATS if quantization is None else _ROUNDED_FORMATS
            packed = self._reserve(formats[weight.format], n, k)
            self._pack_codes(packed, weight)
            return packed
        weight = weight.contiguous()
        code = CODES[weight.dtype]
        if quantization is not None:
            packed = self._reserve(_ROUNDED_FORMATS[quantization], n, k)
        elif weight.dtype == torch.bfloat16 and not for_logits:
            packed = self._reserve(_BLOCKS, n, k)
        else:
            packed = self._reserve(code, n, k)
        self._native.pack(weight.data_ptr(), code, n, k, packed.ptr, packed.code)
        return packed

    def _reserve(self, code: int, n: int, k: int) -> CpuWeight:
        data = self._weights.take(self._native.packed_bytes(code, n, k))
        return CpuWeight(data, data.data_ptr(), code, n, k)

    def _pack_codes(self, packed: CpuWeight, weight: QuantizedWeight) -> None:
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        minimums = None if weight.minimums is None else weight.minimums.contiguous()
        self._native.pack_codes(
            codes.data_ptr(),
            scales.data_ptr(),
            0 if minimums is None else minimums.data_ptr(),
            packed.n,
            packed.k,
            packed.ptr,
            packed.code,
        )

    def linear(
        self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, K] times the packed [N, K] transposed, plus bias [N]: [T, N]."""
        return self._linear(x, weight, bias, x.dtype)

    def pack_heads(self, weight: torch.Tensor) -> tuple[CpuWeight, ...]:
        """Each head's weight [N, K] in panels."""
        return tuple(self.pack(one) for one in weight)

    def linear_heads(self, x: torch.Tensor, weight: tuple[CpuWeight, ...]) -> torch.Tensor:
        """x [T, H, K], head by head, times the packed [N, K] transposed: [T, H, N]."""
        num_tokens, num_heads, k = x.shape
        n = weight[0].n
        out = self._empty((num_tokens, num_heads, n), x.dtype)
        self._native.linear_heads(
            x.data_ptr(),
            CODES[x.dtype],
            num_tokens,
            x.stride(0),
            x.stride(1),
            [packed.ptr for packed in weight],
            weight[0].code,
            n,
            k,
            out.data_ptr(),
        )
        return out

    def logits(self, x: torch.Tensor, weight: CpuWeight) -> torch.Tensor:
        """x [R, C] times the packed [V, C] transposed: float32 [R, V]."""
        return self._linear(x, weight, None, torch.float32)

    def _linear(
        self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if x.shape[1] != weight.k or x.stride(1) != 1:
            raise BackendError("shape", f"linear: {list(x.shape)} times [{weight.n}, {weight.k}]^T")
        out = self._empty((x.shape[0], weight.n), dtype)
        self._native.linear(
            x.data_ptr(),
            CODES[x.dtype],
            x.shape[0],
            x.stride(0),
            weight.ptr,
            weight.code,
            weight.n,
            weight.k,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            CODES[dtype],
            weight.n,
        )
        return out

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows int32 [T] of table [V, C]: [T, C]."""
        return self.take_rows(table, token_ids)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows int32 [R] of x [T, C]: [R, C]."""
        out = self._empty((len(rows), x.shape[1]), x.dtype)
        size = x.element_size()
        self._native.take_rows(
            x.data_ptr(),
            rows.data_ptr(),
            out.data_ptr(),
            len(rows),
            x.shape[0],
            x.shape[1] * size,
            x.stride(0) * size,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
        out = self._empty(x.shape, x.dtype)
        if x.dim() != 2:
            x = x.reshape(-1, x.shape[-1])
        self._native.rms_norm(
            x.data_ptr(),
            0,
            weight.data_ptr(),
            out.data_ptr(),
            0,
            CODES[x.dtype],
            x.shape[0],
            x.shape[1],
            x.stride(0),
            0,
            eps,
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        out = self._empty(x.shape, x.dtype)
        total = self._empty(x.shape, x.dtype)
        self._native.rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
            CODES[x.dtype],
            x.shape[0],
            x.shape[1],
            x.stride(0),
            residual.stride(0),
            eps,
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
        """Query [T, H, D] and key [T, H_kv, D] rotated by positions int32 [T]."""
        query_out = self._empty(query.shape, query.dtype)
        key_out = self._empty(key.shape, key.dtype)
        self._native.rope(
            query.data_ptr(),
            key.data_ptr(),
            query_out.data_ptr(),
            key_out.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            CODES[query.dtype],
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[2],
            cos_sin.shape[1],
            query.stride(0),
            key.stride(0),
            is_interleaved,
        )
        return query_out, key_out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        num_rows, width = gate_up.shape
        out = self._empty((num_rows, width // 2), gate_up.dtype)
        self._native.silu_mul(
            gate_up.data_ptr(),
            out.data_ptr(),
            CODES[gate_up.dtype],
            num_rows,
            width // 2,
            gate_up.stride(0),
        )
        return out

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Each expert on the tokens that chose it: [T, C]."""
        if isinstance(self._native, Recorder):
            raise NotRecordable("which experts a token takes is chosen by torch's operations")
        table = self._experts.get(experts)
        if table is None:
            pairs = zip(experts.gate_up, experts.down, strict=True)
            table = np.array([(a.ptr, a.code, b.ptr, b.code) for a, b in pairs], np.int64)
            self._experts[experts] = table
        expert_ids, expert_weights = expert_ids.contiguous(), expert_weights.contiguous()
        biases = (experts.gate_up_bias, experts.down_bias)
        out = self._empty(x.shape, x.dtype)
        self._native.moe(
            x.data_ptr(),
            CODES[x.dtype],
            x.shape[0],
            x.stride(0),
            expert_ids.data_ptr(),
            expert_weights.data_ptr(),
            expert_ids.shape[1],
            table.ctypes.data,
            len(table),
            x.shape[1],
            experts.down[0].k,
            *(0 if bias is None else bias.data_ptr() for bias in biases),
            experts.swiglu_limit or 0.0,
            experts.swiglu_alpha,
            out.data_ptr(),
        )
        return out

    # -- execution ----------------------------------------------------------------------------

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """One native program for steps of all sizes, recorded when `fn` first runs."""
        return RecordedStep(self, super().compile(fn, bucket, example))

    @contextmanager
    def recording(self, inputs: StepInputs) -> Iterator[Recorder]:
        """Within it the native calls of the step over `inputs` are written down."""
        native = self._native
        recorder = Recorder(native, inputs)
        self._native = recorder
        try:
            yield recorder
        finally:
            self._native = native

    # -- sampling -----------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """One token from each row; penalties, bias and masks change the logits first."""
        if isinstance(self._native, Recorder):
            self._native.end(logits)
        scores = sampling.adjust(logits, params)
        token_ids = torch.empty(len(logits), dtype=torch.int32)
        self._native.sample(
            scores.data_ptr(),
            scores.shape[0],
            scores.shape[1],
            scores.stride(0),
            params.temperature.data_ptr(),
            params.top_k.data_ptr(),
            params.top_p.data_ptr(),
            params.min_p.data_ptr(),
            params.seed.data_ptr(),
            params.position.data_ptr(),
            token_ids.data_ptr(),
        )
        return sampling.finish(token_ids, logits, params)


def _cpu_name() -> str:
    """The processor's name; its architecture where the system does not tell."""
    import platform
    from pathlib import Path

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
