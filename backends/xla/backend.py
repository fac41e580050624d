"""XlaBackend: the seam over XLA programs of fixed sizes, for TPUs; XLA's CPU client stands for one.

JAX is imported when the backend starts, not before: without it the backend says what is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
    """TPUs, or where there is none XLA's CPU client."""

    name = "tpu"
    # what stands for a TPU is taken when it is named, not before the kernels made for a CPU
    rank = 20 if memory.tpu_chips() else -5

    def __init__(self, num_devices: int = 1) -> None:
        """Start JAX on TPUs, or on the host where there are none.

        Args:
            num_devices: that divide weights and KV heads among them.
        """
        super().__init__()
        import jax

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
        if num_devices > len(devices):
            raise Unsupported(f"{num_devices} devices were asked for, JAX finds {len(devices)}")
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
        """Which chips there are, by the PCI bus; what is not installed, and the extra that is."""
        chips = memory.tpu_chips()
        extra = "tpu" if chips else "xla-cpu"
        wanted = (*_PACKAGES, "libtpu") if chips else _PACKAGES
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        where = f"{len(chips)} TPU {chips[0]}" if chips else "no TPU here: XLA's CPU client"
        if missing:
            return DeviceReport(
                is_available=False,
                summary=f"{', '.join(missing)} not installed: pip install 'portalm[{extra}]' "
                f"({where})",
            )
        versions = tuple((name, importlib.metadata.version(name)) for name in wanted)
        return DeviceReport(
            is_available=True,
            summary=where if chips else f"{where} stands for one",
            details=versions,
        )

    # -- device and memory --------------------------------------------------------------------

    def memory(self) -> MemInfo:
        """The device's; the host's, or what its container allows, where it is the host."""
        return memory.memory(self._device)

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy on the host: a step takes all of its inputs to the device at once."""
        return torch.from_numpy(np.array(host, order="C"))

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """A copy under way, of what a step drew; what is on the host already is just that."""
        from portalm_backends.xla.bridge import ArrayFuture, DeviceTensor

        return ArrayFuture(x.jax()) if isinstance(x, DeviceTensor) else DoneFuture(x.numpy())

    def one_plus_one(self) -> int:
        """By XLA."""
        import jax

        one = jax.device_put(np.ones((), np.int32), self._device)
        return int(one + one)

    def _call(
        self, operation: Callable[..., Any], *tensors: torch.Tensor | None, **static: Any
    ) -> torch.Tensor:
        """What an operation makes of tensors: a tensor again."""
        return self._bridge.result(operation(*self._arrays(tensors), **static))

    def _call_for_two(
        self, operation: Callable[..., Any], *tensors: torch.Tensor, **static: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of an operation that gives two."""
        one, other = operation(*self._arrays(tensors), **static)
        return self._bridge.result(one), self._bridge.result(other)

    def _arrays(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        return [None if tensor is None else self._bridge.array(tensor) for tensor in tensors]

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Keys and values of one block over all layers."""
        return self._cache.bytes_per_block(spec, is_tpu=self._is_tpu)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> XlaKV:
        """One array a layer; one warning where a TPU has no kernels for it."""
        reason = self._kernels.why_not(spec)
        if self._is_tpu and reason is not None:
            logger.warning("attention is XLA's operations, which are slower: %s", reason)
        heads = self._bridge.divided(spec.num_kv_heads, axis=1)
        layers = self._cache.allocate(spec, num_blocks, is_tpu=self._is_tpu, device=heads)
        return self._cache.XlaKV(spec, num_blocks, layers)

    def kv_write(
        self, kv: XlaKV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> XlaKV:
        """Put [T, H_kv, D] each into their slots; the cache that came in is gone."""
        where: tuple[torch.Tensor, ...]
        if self._has_kernels(kv):
            write = self._kernels.write_in_place
            where = (meta.query_start_loc, meta.seq_lens, meta.block_table)
        else:
            write, where = self._cache.write_in_place, (meta.slot_mapping,)
        arrays = self._arrays((key, None if kv.spec.shares_values else value, *where))
        return kv.with_layer(layer, write(kv.layers[layer], *arrays))

    def _has_kernels(self, kv: XlaKV) -> bool:
        # XLA divides its own operations among devices, and no kernels
        is_alone = len(self._bridge.devices) == 1
        return self._is_tpu and is_alone and self._kernels.why_not(kv.spec) is None

    def kv_copy(self, kv: XlaKV, src: torch.Tensor, dst: torch.Tensor) -> XlaKV:
        """Blocks src[i] to dst[i], int32 [N] each, over all layers."""
        return replace(kv, layers=self._cache.copy_blocks(kv.layers, src.numpy(), dst.numpy()))

    def kv_export(self, kv: XlaKV, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks int32 [N] as [N, L, 2, B, H_kv, D] on the host."""
        return self._bridge.result(
            self._cache.export_jitted(
                kv.layers,
                blocks.numpy(),
                kv.spec.head_size,
                shares_values=kv.spec.shares_values,
            )
        )

    def kv_import(self, kv: XlaKV, blocks: torch.Tensor, wire: torch.Tensor) -> XlaKV:
        """The inverse of `kv_export`."""
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
        """Attention of [T, H, D], all requests in one operation."""
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
        """Attention of [T, H, D] within each request."""
        return self._call(self._attend_encoder, query, key, value, meta.query_start_loc, spec=spec)

    # -- layers -------------------------------------------------------------------------------

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> Weight:
        """The weight [N, K] on the device, in one copy; of few bits, it stays so there."""
        return self._weights.pack(self._bridge, weight, quantization)

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, K] times weight [N, K] transposed, plus bias [N]: [T, N]."""
        if isinstance(weight, torch.Tensor):
            return self._call(self._layers.linear, x, weight, bias)
        few = (weight.codes, weight.scales, weight.minimums)
        return self._call(self._weights.linear, x, bias, *few)

    def pack_heads(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [H, N, K] on the device, its heads divided where devices are several."""
        rows = self._bridge.divided(weight.shape[0], axis=0)
        return self._bridge.tensor(self._bridge.put(weight, rows))

    def linear_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, H, K] times weight [H, N, K], head by head: [T, H, N]."""
        return self._call(self._layers.linear_heads, x, weight)

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x [R, C] times weight [V, C] transposed in float32: [R, V]."""
        if isinstance(weight, torch.Tensor):
            return self._call(self._layers.logits, x, weight)
        few = (weight.codes, weight.scales, weight.minimums)
        return self._call(self._weights.logits, x, *few)

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
        return self._call_for_two(self._layers.add_rms_norm, x, residual, weight, eps=eps)

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
        """Query [T, H, D] and key [T, H_kv, D] rotated by positions int32 [T]."""
        return self._call_for_two(
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
        """A few sizes of decodes alone, a few with prompts, all of `max_blocks`."""
        self._programs.max_rows = max(
            self._programs.max_rows, max_requests + MAX_PROMPT_LOGPROB_ROWS
        )
        decodes = {min(size, max_requests) for size in _sizes(8, max_requests)}
        prompts = {min(size, max_tokens) for size in _sizes(128, max_tokens)}
        if max_tokens > 256:  # a step of prompts costs what it is padded to
            prompts.add(max_tokens // 2)
        return [
            *(Bucket(n, n, max_blocks, 1) for n in sorted(decodes)),
            *(Bucket(n, min(n, max_requests), max_blocks, n) for n in sorted(prompts)),
        ]

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """A program of `example`'s sizes; `build` makes it, or its first call."""
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
        """Trace these one after the other, and compile them side by side.

        What an earlier start traced or compiled is read instead.

        Raises:
            BackendError: of kind oom, with the numbers, if the largest does not fit.
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
            "%d steps: %.1f s to trace or to read, %.1f s more to compile or to read",
            len(programs),
            traced - started,
            time.perf_counter() - traced,
        )
        memory.require_room(max((step.step_bytes() for step in programs), default=0), self.memory())

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """One token from each row of float32 logits [R, V]."""
        trace = self._programs.trace
        if trace is not None:
            ids = trace.sample(self._bridge.array(logits))
            return SampleOutput(token_ids=self._bridge.tensor(ids))
        from portalm_backends.xla.finishing import on_host

        finisher = self._programs.finisher(*logits.shape)
        out, _ = finisher(self._bridge.array(logits), params)
        return on_host(out, params.num_logprobs)


def _sizes(smallest: int, largest: int) -> list[int]:
    """From `smallest`, each four times the one before, up to the first that holds `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(4 * sizes[-1])
    return sizes
