"""XlaBackend: TPUs through XLA programs of fixed sizes; without a TPU, XLA's CPU client.

JAX is imported only when the backend starts, so that `find` can report that it is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    KV,
    AttentionSpec,
    Bucket,
    Capabilities,
    DeviceReport,
    HostFuture,
    KVSpec,
    MemInfo,
    QuantizedWeight,
    SampleOutput,
    SampleParams,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.config import MAX_PROMPT_LOGPROB_ROWS, cache_dir
from portalm.errors import Unsupported
from portalm_backends.portable.backend import DoneFuture, TorchBackend
from portalm_backends.xla import memory

if TYPE_CHECKING:
    from portalm_backends.xla.cache import XlaKV
    from portalm_backends.xla.weights import Weight

logger = logging.getLogger(__name__)

_FEATURES = frozenset({"sliding_window", "soft_cap", "alibi", "sinks", "shared_values"})
_PACKAGES = ("flatbuffers", "jax", "jaxlib", "torchax")


class XlaBackend(TorchBackend):
    """TPUs, or XLA's CPU client on a machine without a TPU."""

    name = "tpu"
    # XLA's CPU client must be named: "auto" prefers the cpu backend, whose kernels are faster
    rank = 20 if memory.tpu_chips() else -5

    _process_id: ClassVar[int | None] = None
    """Process in which JAX was started; None: it was not."""

    def __init__(self, *, num_devices: int = 1) -> None:
        """Start JAX on the machine's TPUs, or on its CPU if there are none.

        Args:
            num_devices: devices over which weights and KV heads are sharded; `--device tpu` uses
                one, `LLM(model, backend=XlaBackend(num_devices=4))` four.

        Raises:
            Unsupported: JAX does not find that many devices.
        """
        super().__init__()
        import jax

        XlaBackend._process_id = os.getpid()
        platform = "tpu" if memory.tpu_chips() else "cpu"
        jax.config.update("jax_platforms", platform)
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        from portalm_backends.xla import attention, cache, kernels, layers, weights
        from portalm_backends.xla.bridge import Bridge
        from portalm_backends.xla.graph import Programs
        from portalm_backends.xla.store import Store

        devices = jax.devices(platform)
        if not 1 <= num_devices <= len(devices):
            raise Unsupported(
                f"num_devices must be from 1 to {len(devices)}, the {platform} devices that JAX "
                f"finds here; got {num_devices}"
            )
        self._device = devices[0]
        self._cache, self._kernels = cache, kernels
        self._layers, self._weights = layers, weights
        sizes = ("spec", "max_query_len")
        self._attend = jax.jit(attention.paged_attention, static_argnames=sizes)
        self._attend_encoder = jax.jit(attention.encoder_attention, static_argnames="spec")
        self._bridge = Bridge(devices[:num_devices])
        self._programs = Programs(
            self._bridge,
            Store(cache_dir() / "xla" / "traced"),
            num_threads=len(os.sched_getaffinity(0)),
        )
        self._is_tpu = platform == "tpu"
        self.capabilities = Capabilities(
            dtypes=frozenset({"float32", "bfloat16"}),
            kv_dtypes=cache.KV_DTYPES,
            shared_kv_dtypes=cache.DTYPES,
            features=_FEATURES,
            quantizations=weights.FORMATS,
            static_shapes=True,
            max_steps_in_flight=2,
            # the CPU client computes bfloat16 several times slower than float32
            auto_dtype=None if self._is_tpu else "float32",
        )

    @classmethod
    def find(cls) -> DeviceReport:
        """Report the TPU chips on the PCI bus, and which packages are missing."""
        chips = memory.tpu_chips()
        extra = "tpu" if chips else "xla-cpu"
        wanted = (*_PACKAGES, "libtpu") if chips else _PACKAGES
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        where = f"{len(chips)} TPU {chips[0]}" if chips else "no TPU: XLA's CPU client"
        if missing:
            return DeviceReport(
                is_available=False,
                summary=f"{', '.join(missing)} not installed: pip install 'portalm[{extra}]' "
                f"({where})",
            )
        if cls._process_id not in (None, os.getpid()):
            return DeviceReport(
                is_available=False,
                summary=f"process {os.getpid()} was forked from one that uses JAX, whose threads a "
                f"fork does not copy: start processes with the multiprocessing method spawn",
            )
        versions = tuple((name, importlib.metadata.version(name)) for name in wanted)
        return DeviceReport(
            is_available=True,
            summary=where if chips else f"{where} is used instead",
            details=versions,
        )

    # -- device and memory --------------------------------------------------------------------

    def memory(self) -> MemInfo:
        """Memory of the device; on the CPU client that of the host or its container."""
        return memory.memory(self._device)

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy on the host: a step transfers all of its inputs to the device at once."""
        return torch.from_numpy(np.array(host, order="C"))

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Start copying a device tensor to the host; a host tensor is done at once."""
        from portalm_backends.xla.bridge import ArrayFuture, DeviceTensor

        return ArrayFuture(x.jax()) if isinstance(x, DeviceTensor) else DoneFuture(x.numpy())

    def one_plus_one(self) -> int:
        """Compute 1 + 1 on the device with XLA."""
        import jax

        one = jax.device_put(np.ones((), np.int32), self._device)
        return int(one + one)

    def _call(
        self, operation: Callable[..., Any], *tensors: torch.Tensor | None, **static: Any
    ) -> torch.Tensor:
        """Call a JAX operation with tensors; return its result as a tensor."""
        return self._bridge.result(operation(*self._arrays(tensors), **static))

    def _call_pair(
        self, operation: Callable[..., Any], *tensors: torch.Tensor, **static: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call a JAX operation that returns two arrays; return them as tensors."""
        first, second = operation(*self._arrays(tensors), **static)
        return self._bridge.result(first), self._bridge.result(second)

    def _arrays(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        return [None if tensor is None else self._bridge.array(tensor) for tensor in tensors]

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Bytes of one block's keys and values over all layers, padding included."""
        return self._cache.bytes_per_block(spec, is_tpu=self._is_tpu)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> XlaKV:
        """Allocate one array per layer; warn on a TPU if the kernels cannot read this cache."""
        reason = self._kernels.unsupported_reason(spec)
        if self._is_tpu and reason is not None:
            logger.warning(
                "attention runs as XLA operations, which are slower than the TPU kernels: %s",
                reason,
            )
        heads = self._bridge.sharded(spec.num_kv_heads, axis=1)
        layers = self._cache.allocate(spec, num_blocks, is_tpu=self._is_tpu, device=heads)
        return self._cache.XlaKV(spec, num_blocks, layers)

    def kv_write(
        self, kv: XlaKV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> XlaKV:
        """Write key and value, [T, H_kv, D] each, into their slots; `kv` is donated."""
        where: tuple[torch.Tensor, ...]
        if self._has_kernels(kv):
            write = self._kernels.write_in_place
            where = (meta.query_start_loc, meta.seq_lens, meta.block_table)
        else:
            write, where = self._cache.write_in_place, (meta.slot_mapping,)
        arrays = self._arrays((key, None if kv.spec.shares_values else value, *where))
        return kv.with_layer(layer, write(kv.layers[layer], *arrays))

    def _has_kernels(self, kv: XlaKV) -> bool:
        # XLA shards its own operations over several devices, but not the kernels
        is_single = len(self._bridge.devices) == 1
        return self._is_tpu and is_single and self._kernels.unsupported_reason(kv.spec) is None

    def kv_copy(self, kv: XlaKV, src: torch.Tensor, dst: torch.Tensor) -> XlaKV:
        """Copy blocks src[i] to dst[i], int32 [N] each, in all layers."""
        return replace(kv, layers=self._cache.copy_blocks(kv.layers, src.numpy(), dst.numpy()))

    def kv_export(self, kv: XlaKV, blocks: torch.Tensor) -> torch.Tensor:
        """Copy blocks int32 [N] to the host in the wire layout, [N, L, 2, B, H_kv, D]."""
        return self._bridge.result(
            self._cache.export_jitted(
                kv.layers,
                blocks.numpy(),
                kv.spec.head_size,
                shares_values=kv.spec.shares_values,
            )
        )

    def kv_import(self, kv: XlaKV, blocks: torch.Tensor, wire: torch.Tensor) -> XlaKV:
        """Write blocks in the wire layout, as `kv_export` returns them, into blocks int32 [N]."""
        layers = self._cache.import_in_place(kv.layers, blocks.numpy(), self._bridge.array(wire))
        return replace(kv, layers=layers)

    # -- attention ----------------------------------------------------------------------------

    def attend(
        self,
        kv: XlaKV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of query [T, H, D] over each request's context, in one operation."""
        array = self._bridge.array
        attend = self._kernels.attend if self._has_kernels(kv) else self._attend
        return self._bridge.result(
            attend(
                array(query),
                kv.layers[layer],
                array(meta.query_start_loc),
                array(meta.seq_lens),
                array(meta.block_table),
                spec,
                sinks=None if sinks is None else array(sinks),
                max_query_len=meta.max_query_len
                if meta.bucket is None
                else meta.bucket.max_query_len,
            )
        )

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attention of query [T, H, D] to all tokens of the same request."""
        return self._call(self._attend_encoder, query, key, value, meta.query_start_loc, spec=spec)

    # -- layers -------------------------------------------------------------------------------

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> Weight:
        """Copy the weight [N, K] to the device; a quantized weight stays quantized there."""
        return self._weights.pack(self._bridge, weight, quantization)

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [T, K] with weight [N, K] transposed; add bias [N]: [T, N]."""
        if isinstance(weight, torch.Tensor):
            return self._call(self._layers.linear, x, weight, bias)
        parts = (weight.codes, weight.scales, weight.minimums)
        return self._call(self._weights.linear, x, bias, *parts)

    def pack_heads(self, weight: torch.Tensor) -> torch.Tensor:
        """Copy the weight [H, N, K] to the devices, sharded by heads if there are several."""
        heads = self._bridge.sharded(weight.shape[0], axis=0)
        return self._bridge.tensor(self._bridge.put(weight, heads))

    def linear_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply x [T, H, K] with weight [H, N, K] head by head: [T, H, N]."""
        return self._call(self._layers.linear_heads, x, weight)

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Multiply x [R, C] with weight [V, C] transposed: float32 [R, V]."""
        if isinstance(weight, torch.Tensor):
            return self._call(self._layers.logits, x, weight)
        parts = (weight.codes, weight.scales, weight.minimums)
        return self._call(self._weights.logits, x, *parts)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows int32 [T] of table [V, C]: [T, C]."""
        return self._call(self._layers.take, table, token_ids)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
        return self._call(self._layers.rms_norm, x, weight, eps=eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        return self._call_pair(self._layers.add_rms_norm, x, residual, weight, eps=eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias, rounded to x's dtype once."""
        return self._call(self._layers.layer_norm, x, weight, bias, eps=eps)

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
        return self._call_pair(
            self._layers.rope, query, key, positions, cos_sin, is_interleaved=is_interleaved
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        return self._call(self._layers.silu_mul, gate_up)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x * (1 + erf(x / sqrt(2))) / 2."""
        return self._call(self._layers.gelu, x)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows int32 [R] of x [T, C]: [R, C]."""
        return self._call(self._layers.take, x, rows)

    # -- execution ----------------------------------------------------------------------------

    def buckets(self, max_tokens: int, max_requests: int, max_blocks: int) -> Sequence[Bucket]:
        """A few sizes for decode-only steps and a few for steps with prompts, all `max_blocks`."""
        self._programs.max_rows = max(
            self._programs.max_rows, max_requests + MAX_PROMPT_LOGPROB_ROWS
        )
        decodes = {min(size, max_requests) for size in _sizes(8, max_requests)}
        prompts = {min(size, max_tokens) for size in _sizes(128, max_tokens)}
        if max_tokens > 256:  # a step with prompts costs as much as the size it is padded to
            prompts.add(max_tokens // 2)
        return [
            *(Bucket(n, n, max_blocks, 1) for n in sorted(decodes)),
            *(Bucket(n, min(n, max_requests), max_blocks, n) for n in sorted(prompts)),
        ]

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Return a program for `example`'s sizes; `build`, or its first call, compiles it."""
        super().compile(fn, bucket, example)
        from portalm_backends.xla.graph import Program

        assert example is not None
        return Program(self._programs, fn, example)

    def build(
        self,
        steps: Sequence[StepFn],
        weights: Weights,
        kv: KV,
        progress: Callable[[float], None],
        *,
        identity: str | None = None,
    ) -> None:
        """Trace the steps one after another while other threads compile them.

        Steps that an earlier start traced or compiled are read from disk.

        Raises:
            BackendError: kind oom, with the sizes, if the largest step does not fit.
        """
        from portalm_backends.xla.graph import Program

        started = time.perf_counter()
        programs = [step for step in steps if isinstance(step, Program)]
        for step in programs:
            step.begin(weights, kv, identity)
        traced = time.perf_counter()
        for i, step in enumerate(programs):
            progress(i / len(programs))
            step.wait()
        logger.info(
            "%d steps: %.1f s to trace or read, then %.1f s to compile or read",
            len(programs),
            traced - started,
            time.perf_counter() - traced,
        )
        memory.require_room(max((step.step_bytes() for step in programs), default=0), self.memory())

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token from each row of float32 logits [R, V]."""
        trace = self._programs.trace
        if trace is not None:
            ids = trace.sample(self._bridge.array(logits))
            return SampleOutput(token_ids=self._bridge.tensor(ids))
        from portalm_backends.xla.finishing import on_host

        finisher = self._programs.finisher(*logits.shape)
        out, _ = finisher(self._bridge.array(logits), params)
        return on_host(out, params.num_logprobs)


def _sizes(smallest: int, largest: int) -> list[int]:
    """Sizes from `smallest`, each four times the previous, up to the first >= `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(4 * sizes[-1])
    return sizes
