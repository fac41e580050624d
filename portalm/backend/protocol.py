"""`Backend`: the interface of one accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from portalm.backend.capabilities import Capabilities, DeviceReport, MemInfo
from portalm.backend.kv_cache import KV, KVSpec
from portalm.backend.sampling import SampleOutput, SampleParams
from portalm.backend.step import AttentionSpec, Bucket, HostFuture, StepFn, StepInputs, StepMeta
from portalm.backend.weights import Experts, PackedWeight, QuantizedWeight, Weights

if TYPE_CHECKING:
    import numpy as np
    import torch

API_VERSION = (1, 0)
"""Major and minor version of `Backend`.

A new optional method raises the minor version; a change that existing backends do not work with
raises the major version. `load_backend` refuses a backend of another major version.
"""


class Backend(Protocol):
    """One accelerator.

    `portalm_backends.portable.backend.TorchBackend`, the portable base class, implements every
    optional member in torch. A class that does not derive from it must implement all of them.
    """

    # -- description --------------------------------------------------------------------------

    api_version: tuple[int, int]
    """The `API_VERSION` that the backend was written for. Optional: the portable base class has
    the current one; a backend in a package of its own should declare it."""
    name: str
    """The name that users pass to --device. Required."""
    rank: int
    """`auto` picks the available backend of the highest rank; one below 0 only runs by name.
    Optional: -10."""
    capabilities: Capabilities
    """What works on this device. Required."""

    @classmethod
    def find(cls) -> DeviceReport:
        """Report whether the device is usable here; must not raise or start the device.

        Required.
        """
        ...

    # -- device and memory --------------------------------------------------------------------

    def device(self) -> torch.device:
        """Return the device that holds this backend's tensors.

        Optional: the host.
        """
        ...

    def memory(self) -> MemInfo:
        """Return total and free bytes at this moment, within the limits of a container.

        Required.
        """
        ...

    def peak(self) -> AbstractContextManager[Callable[[], int]]:
        """Measure memory: in `with backend.peak() as used`, used() is the peak above the start.

        Optional: the growth of this process's resident memory, right where the device is the host.
        """
        ...

    def to_device(self, host: np.ndarray) -> torch.Tensor:
        """Copy an array to the device, dtype kept; may return before the copy is done.

        Optional: a synchronous copy by torch.
        """
        ...

    def step_uploads(self) -> AbstractContextManager[None]:
        """Upload the arrays of one step in one transfer.

        Within the context, `to_device` and `block_table` may return tensors whose values arrive
        when it ends, and which the next such context overwrites.

        Optional: a context without an effect.
        """
        ...

    def block_table(
        self, block_ids: np.ndarray, block_starts: np.ndarray, width: int
    ) -> torch.Tensor:
        """Return a step's block table on the device, int32 [S, width].

        Row i starts with block_ids[block_starts[i]] to block_ids[block_starts[i + 1]]; what
        follows is 0, or unspecified on a device whose `attend` never reads it.

        Optional: a table of zeros, filled on the host, then `to_device`.
        """
        ...

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Start copying `x` to the host.

        Optional: a copy that is complete on return.
        """
        ...

    def device_errors(self) -> AbstractContextManager[None]:
        """Translate exceptions of the device's library, within the context, to `BackendError`.

        Optional: no translation.
        """
        ...

    def use_threads(self, num_threads: int) -> None:
        """Set the number of host threads that compute (--cpu-threads).

        Optional: the size of torch's thread pool.
        """
        ...

    def probe(self, timeout_s: float) -> None:
        """Run one tiny operation with a deadline; `BackendError` if the device does not answer.

        Optional: an addition by torch on another thread.
        """
        ...

    # -- KV cache -----------------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Return the bytes of one block over all layers, scales included.

        Required.
        """
        ...

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """Allocate an uninitialized cache of `num_blocks` blocks, the null block included.

        Raises `Unsupported` for a spec that `capabilities` do not claim, and `BackendError` of
        kind oom where memory is short. The portable base class does both and calls `_kv_alloc`
        for the allocation.

        Required.
        """
        ...

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Write this step's keys and values, [T, H_kv, D] each, to their slots.

        A cache that `shares_values` ignores `value`.

        Required.
        """
        ...

    def kv_copy(self, kv: KV, src: torch.Tensor, dst: torch.Tensor) -> KV:
        """Copy blocks src[i] to dst[i], int32 [N] each, over all layers; the sets are disjoint.

        Optional: for a cache that is one tensor [L, P, NB, B, H_kv, D].
        """
        ...

    def kv_export(self, kv: KV, blocks: torch.Tensor) -> torch.Tensor:
        """Return blocks int32 [N] in the wire layout: [N, L, P, B, H_kv, D] on the host.

        The dtype is `wire_dtype`; P is `num_planes`: keys, then values, or keys alone.

        Optional: for a cache that is one tensor [L, P, NB, B, H_kv, D].
        """
        ...

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """Write blocks in the wire layout; exported again, codes and scales are the same.

        Optional: for a cache that is one tensor [L, P, NB, B, H_kv, D].
        """
        ...

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Plan the attention of a step: called once per step, outside the captured step.

        Optional: no plan.
        """
        ...

    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of each query token over its request's context.

        `query` is [T, H, D]; the cache already holds this step's keys and values. One call handles
        decodes, prefills and a mix of both. `sinks`, float32 [H] where `spec.has_sinks`, take part
        in the softmax of each row of their head and have no value (Xiao et al., "Efficient
        streaming language models with attention sinks", 2023, as gpt-oss learns them). Returns
        [T, H, D], or [T, H, value_size], in the dtype of `query`; rows of pad tokens are
        unspecified.

        Required.
        """
        ...

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Bidirectional attention of each token to all tokens of its request, without a cache.

        `query` is [T, H, D], `key` and `value` are [T, H_kv, D]; whole prompts, concatenated.
        Returns [T, H, D] in the dtype of `query`; rows of pad tokens are unspecified. Soft caps do
        not apply.

        Optional: torch, grouping prompts by their lengths on the host.
        """
        ...

    # -- layers -------------------------------------------------------------------------------

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """Convert a linear weight [N, K] on the host to the device's layout.

        A tensor comes in the model's dtype; `quantization` names the format to round it to. A
        `QuantizedWeight` keeps its values. Activations keep at least the precision of bfloat16
        unless `quantization` is given: then they may be rounded to 8 bits. A format that is not
        in `capabilities.quantizations` raises `Unsupported`; the portable base class checks that
        and calls `_pack`. `for_logits`: the weight is for `logits`, which multiplies in float32.

        Optional: the tensor itself, on the device.
        """
        ...

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply [T, K] by the packed [N, K] transposed, plus bias [N]: [T, N] in x's dtype.

        Optional: torch.
        """
        ...

    def pack_heads(self, weight: torch.Tensor) -> PackedWeight:
        """Convert a weight [H, N, K] on the host, in the model's dtype, for `linear_heads`.

        Optional: the tensor itself, on the device.
        """
        ...

    def linear_heads(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Multiply each head's vectors by that head's weight: [T, H, K] x [H, N, K] -> [T, H, N].

        Latent attention (DeepSeek) absorbs its up-projections this way.

        Optional: torch.
        """
        ...

    def logits(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Apply the output head: [R, C] times the packed [V, C] transposed, in float32: [R, V].

        Optional: torch, with both operands cast to float32.
        """
        ...

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Look up rows int32 [T] of table [V, C]: [T, C].

        Optional: torch.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32.

        `x` may be a strided view.

        Optional: torch.
        """
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (rms_norm(x + residual), x + residual); the sum is rounded to x's dtype once.

        Optional: torch.
        """
        ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Layer norm: (x - mean) / sqrt(variance + eps) * weight + bias, in float32.

        Over the last dimension of `x`, which may be a strided view.

        Optional: torch.
        """
        ...

    def rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query [T, H, D] and key [T, H_kv, D] by their positions, int32 [T].

        `cos_sin` is float32 [max_position, rotary_dim]: cosines, then sines.

        Optional: torch.
        """
        ...

    def rope_kv_write(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[KV, torch.Tensor]:
        """Apply `rope` at the step's positions, then `kv_write` the rotated key and the value.

        Layers call this method, so that a device can fuse the two. Returns the cache and the
        rotated query, [T, H, D].

        Optional: `rope`, then `kv_write`.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU: silu(gate) * up of [T, 2 I], gate first: [T, I].

        Optional: torch.
        """
        ...

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Exact GELU: x * (1 + erf(x / sqrt(2))) / 2.

        Optional: torch.
        """
        ...

    def gelu_tanh(self, x: torch.Tensor) -> torch.Tensor:
        """GELU by tanh: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2.

        Optional: torch.
        """
        ...

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """GeGLU: gelu_tanh(gate) * up of [T, 2 I], gate first: [T, I].

        Optional: torch.
        """
        ...

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Apply each token's experts and sum their outputs by weight.

        `x` is [T, C], `expert_ids` int32 [T, k] (distinct within a row), `expert_weights` float32
        [T, k]. Returns [T, C] in the dtype of `x`; the sum is in float32.

        Optional: torch, computing every expert for every token.
        """
        ...

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Select rows int32 [R] of x [T, C]: [R, C].

        Optional: torch.
        """
        ...

    # -- execution ----------------------------------------------------------------------------

    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        """Return the padded step sizes to capture; None: steps of any size run as they are.

        Optional: None.
        """
        ...

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Capture a step as a CUDA graph, an XLA program or a native program that computes `fn`.

        Optional: `fn` itself.
        """
        ...

    def build(
        self,
        steps: Sequence[StepFn],
        weights: Weights,
        kv: KV,
        progress: Callable[[float], None],
        *,
        identity: str | None = None,
    ) -> None:
        """Compile captured steps at startup, in parallel, instead of at their first calls.

        `weights` and `kv` are those of the later calls; `progress` receives the fraction done.
        `identity` names everything else that the steps compute from: with the same identity,
        sizes, dtypes and code, they compute the same. A device may keep compiled steps on disk
        under it.

        Optional: nothing to do.
        """
        ...

    def seal(self) -> AbstractContextManager[None]:
        """Make a new capture or compilation raise `BackendError` within the context.

        Optional: makes `compile` raise.
        """
        ...

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token from each row of float32 logits [R, V].

        Optional: torch.
        """
        ...
