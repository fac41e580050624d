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
"""Major and minor version of `Backend`. A new optional method raises the minor version; a change
that existing backends cannot run with raises the major one."""


class Backend(Protocol):
    """One accelerator. `portalm_backends.portable` gives a torch default for most of it."""

    name: str
    """What users type after --device."""
    rank: int
    """`auto` takes the available backend of the highest rank; below 0: only when named."""
    capabilities: Capabilities

    @classmethod
    def find(cls) -> DeviceReport:
        """What is here; never raises, never starts the device."""
        ...

    # device and memory
    def device(self) -> torch.device:
        """Where tensors of this backend live."""
        ...

    def memory(self) -> MemInfo:
        """Total and free bytes, right now; container limits count."""
        ...

    def peak(self) -> AbstractContextManager[Callable[[], int]]:
        """`with backend.peak() as used:` - used() is the most bytes allocated, above start."""
        ...

    def to_device(self, host: np.ndarray) -> torch.Tensor:
        """A copy on the device, dtype kept; may return before the copy is done."""
        ...

    def to_device_all(self, hosts: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
        """`to_device` of each: in one transfer, where a transfer costs more than its bytes."""
        ...

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Start copying `x` to the host."""
        ...

    def device_errors(self) -> AbstractContextManager[None]:
        """Within it what the device's library raises comes as `BackendError`."""
        ...

    def use_threads(self, num_threads: int) -> None:
        """Compute with so many threads of the host, where it is the host that computes."""
        ...

    def probe(self, timeout_s: float) -> None:
        """One tiny operation with a deadline; `BackendError` if the device does not answer."""
        ...

    # KV cache
    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers, scales included."""
        ...

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """An uninitialised cache of `num_blocks` blocks, the null block included."""
        ...

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Put this step's keys and values, [T, H_kv, D] each, into their slots.

        In a cache that `shares_values`, `value` is not looked at.
        """
        ...

    def kv_copy(self, kv: KV, src: torch.Tensor, dst: torch.Tensor) -> KV:
        """Copy blocks src[i] to dst[i], int32 [N] each, over all layers; the sets are disjoint."""
        ...

    def kv_export(self, kv: KV, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks int32 [N] in the wire layout: [N, L, P, B, H_kv, D] on the host, `wire_dtype`.

        P is the cache's `num_planes`: keys, then values, or keys alone.
        """
        ...

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """The inverse of `kv_export`; codes and scales come out the same."""
        ...

    # attention
    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Plan the step's attention: outside the captured step, once a step."""
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

        `query` is [T, H, D]; the cache already holds this step. Decode, prefill and mixed in one
        call. `sinks`, float32 [H] where `spec.has_sinks`, take part in the softmax of each row of
        their head and have no value (Xiao et al., "Efficient streaming language models with
        attention sinks", 2023, as gpt-oss learns them). Returns [T, H, D], or [T, H, value_size],
        in the dtype of `query`; rows of pad tokens are unspecified.
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
        """Attention of each token to all tokens of its request in this step, no cache.

        `query` is [T, H, D], `key` and `value` are [T, H_kv, D]; whole prompts end to end. Returns
        [T, H, D] in the dtype of `query`; rows of pad tokens are unspecified. Soft caps do not
        apply.
        """
        ...

    # layers
    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """A linear weight [N, K] on the host in the device's layout.

        A tensor has been cast to the model's dtype already; `quantization` names what it is
        rounded to. A `QuantizedWeight` keeps its values; activations keep at least bfloat16's
        precision but where `quantization` is given: then they may be rounded to 8 bits. Either
        name is among `capabilities.quantizations`; a backend without any need not take either.
        `for_logits`: `logits` reads it, whose products are those of float32.
        """
        ...

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, K] times the packed [N, K] transposed, plus bias [N]: [T, N] in x's dtype."""
        ...

    def pack_heads(self, weight: torch.Tensor) -> PackedWeight:
        """A weight [H, N, K] on the host for `linear_heads`, cast to the model's dtype already."""
        ...

    def linear_heads(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Each head's vector by the head's own weight: [T, H, K] times [H, N, K]: [T, H, N]."""
        ...

    def logits(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """The output head: [R, C] times the packed [V, C] transposed, in float32: [R, V]."""
        ...

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows int32 [T] of table [V, C]: [T, C]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """X / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual); the sum is rounded to x's dtype once."""
        ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last, in float32 inside."""
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
        """Rotate query [T, H, D] and key [T, H_kv, D] by their positions int32 [T].

        cos_sin is float32 [max_position, rotary_dim]: cosines, then sines.
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
        """`rope` by the step's positions, then `kv_write` of the rotated key and the value.

        Returns the cache and the rotated query, [T, H, D]. What a layer calls: a device may do
        both at once.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I] (gate first): [T, I]."""
        ...

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x times the normal distribution's share below x (the exact form, by erf)."""
        ...

    def gelu_tanh(self, x: torch.Tensor) -> torch.Tensor:
        """X times (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2."""
        ...

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu_tanh(gate) * up of [T, 2 I] (gate first): [T, I]."""
        ...

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Each token's experts applied to it and added up by their weights.

        `x` is [T, C], `expert_ids` int32 [T, k] (different ones in a row), `expert_weights` float32
        [T, k]. Returns [T, C] in the dtype of `x`; the sum is over float32.
        """
        ...

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows int32 [R] of x [T, C]: [R, C]."""
        ...

    # execution
    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        """Padded step sizes to capture; None: any size runs without capturing it first."""
        ...

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Capture a step: a CUDA graph, an XLA program, a native program; same meaning as `fn`."""
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
        """Do now, side by side, what these captured steps would do when first called.

        `weights` and `kv` are what they will be called with; `progress` is told the share done.
        `identity` says what the steps do beside that: where it is the same, and so are the sizes,
        the dtypes and the code, they are the same; a device may keep them from start to start.
        """
        ...

    def seal(self) -> AbstractContextManager[None]:
        """Within it a new capture or compilation raises `BackendError`."""
        ...

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Draw one token from each row of float32 logits [R, V]."""
        ...
