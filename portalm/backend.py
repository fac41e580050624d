"""The seam: everything PortaLM asks of a device. Above this line nothing knows which one it is.

Shapes: T tokens this step, S requests, MB blocks of the longest request, B block size, H/H_kv
query/KV heads, D head size, C hidden size, V vocabulary, R rows whose logits are wanted.
Index tensors are int32. The rules behind it are in docs/adding-a-backend.md.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from portalm.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

ENTRY_POINT_GROUP = "portalm.backends"

KV: TypeAlias = Any
"""The KV cache: a handle private to its backend, passed in and returned (never copied)."""

PackedWeight: TypeAlias = Any
"""A linear layer's weight in the device's own layout, as `pack` made it."""

Weights: TypeAlias = dict[str, Any]
"""A model's tensors and packed weights by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear weight [N, K] of few bits: scale * (code - zero) + minimum, by groups of K.

    The form that the simple integer formats of checkpoints have in common; what a device computes
    with is up to it.
    """

    format: str
    """One of `QUANTIZED_FORMATS`, which gives the group's size."""
    codes: torch.Tensor
    """uint8 [N, K]"""
    scales: torch.Tensor
    """float32 [N, K / group]"""
    zero: int = 0
    """The code that stands for 0; the same everywhere."""
    minimums: torch.Tensor | None = None
    """float32 [N, K / group], where the format has them (then `zero` is 0)."""

    @property
    def shape(self) -> torch.Size:
        """Its rows and columns, [N, K]."""
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """Float32 [N, K]."""
        rows, columns = self.codes.shape
        codes = self.codes.float().view(rows, self.scales.shape[1], -1) - self.zero
        weight = codes * self.scales[:, :, None]
        if self.minimums is not None:
            weight = weight + self.minimums[:, :, None]
        return weight.view(rows, columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class Experts:
    """E gated feed-forwards of one shape, of which each token takes a few.

    Compared by identity, so that a backend may keep what it makes of them.
    """

    gate_up: tuple[PackedWeight, ...]
    """Of each expert, [2 I, C], gate rows first, as `Backend.pack` made it."""
    down: tuple[PackedWeight, ...]
    """[C, I] each."""
    gate_up_bias: torch.Tensor | None = None
    """[E, 2 I]"""
    down_bias: torch.Tensor | None = None
    """[E, C]"""
    swiglu_limit: float | None = None
    """None: down(silu(gate) * up). Else gate is clamped to at most this, up to this on either side,
    and it is down(gate * sigmoid(alpha * gate) * (up + 1)), as gpt-oss has it."""
    swiglu_alpha: float = 1.0


QUANTIZED_FORMATS = {
    "int8": 32, "int8_g16": 16, "int8_min": 32, "int8_g16_min": 16, "int4": 32, "int4_min": 32
}  # fmt: skip
"""Group sizes. int8: zero is 128; int4: zero is 8; min: with minimums."""


# -- what a backend says of itself ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do. A claim is tested; what is not claimed raises `Unsupported`."""

    device: str = ""
    """Which of its devices the claims are for, where they differ: sm_80 (A100)."""
    dtypes: frozenset[str]
    """Weights and activations: names such as "bfloat16"."""
    kv_dtypes: frozenset[str]
    """Keys and values in the cache: names of floats, and of `SCALED_KV_DTYPES`."""
    head_sizes: frozenset[int] | None = None
    """Head sizes that attention takes; None: any. Of shared values, `kv_alloc` refuses others."""
    block_sizes: frozenset[int] | None = None
    """KV block sizes; None: any."""
    features: frozenset[str] = frozenset()
    """Of: sliding_window, soft_cap, alibi, sinks, shared_values (values that are their keys), and
    batch_invariant (a request's logits do not depend, bit for bit, on what else is in the
    batch)."""
    quantizations: frozenset[str] = frozenset()
    """Of `QUANTIZED_FORMATS`: weights that `pack` takes as they are, or rounds to. And fp8: what it
    rounds to, by rows of a scale of their own, as `linear` rounds activations then."""
    static_shapes: bool = False
    """Every step must be padded to one of `buckets()`; else a step that no captured bucket holds
    runs as it is."""
    measures_memory: bool = False
    """`peak` and `memory` see what a step takes on the device: the KV pool is sized by measuring
    the largest step, not by a formula."""
    auto_dtype: str | None = None
    """What dtype auto computes in; None: the checkpoint's dtype, where that is claimed."""
    max_steps_in_flight: int = 1
    """1: `to_host` waits for the step. 2: a step may be enqueued while another one runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """What a backend found on this machine, without touching the device."""

    is_available: bool
    summary: str
    """One line: the device if it can run, else exactly what is missing and how to get it."""
    details: tuple[tuple[str, str], ...] = ()
    """More lines for `portalm doctor`: driver, library and instruction set versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemInfo:
    """Bytes of device memory."""

    total: int
    free: int
    host_shared: bool
    """The memory is the host's own (a CPU): other programs live in it too."""


# -- one step ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """The shape of a KV cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    """The name of a float, or one of `SCALED_KV_DTYPES`."""
    shares_values: bool = False
    """A token's value is (the beginning of) its key: keys alone are kept."""

    @property
    def num_planes(self) -> int:
        """Vectors [D] that are kept of a token and KV head: key and value, or one for both."""
        return 1 if self.shares_values else 2

    @property
    def wire_dtype(self) -> str:
        """What `kv_export` gives and `kv_import` takes: of codes, float32 that they stand for."""
        return "float32" if self.dtype in SCALED_KV_DTYPES else self.dtype


SCALED_KV_DTYPES = {"int8": 127.0, "fp8": 448.0}
"""Keys and values in codes of 8 bits, and the largest code: whole numbers, or float8 (e4m3fn).

The key or value of one token and one KV head, x [D], is kept as D codes and one scale, made when it
is written, all in float32:

    scale = max |x| * (1 / largest code), rounded to bfloat16
    code  = x * (1 / scale), rounded to nearest, ties to even

A scale below 2^-100 is 0, and so are its codes. Where x holds a NaN or an infinity the scale is
NaN, and so is all of x. What x has become is code * scale, exact in float32; written again, it
comes to the same codes and scale. A device may keep scales in a wider float than bfloat16. Why:
docs/adr/0026-scales-of-a-token-and-head.md.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What kind of attention a layer computes: `attend` is causal, `attend_encoder` is not."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Multiplies the scores before the softmax."""
    sliding_window: int | None = None
    """A token sees itself and this many less one before it (an encoder's also behind it); None:
    all."""
    soft_cap: float | None = None
    """Scores become cap * tanh(score / cap); None: as they are."""
    alibi_slopes: tuple[float, ...] | None = None
    """One of each query head: slope * (key's position - query's position) is added to a score
    (after the cap). Press et al., "Train short, test long", 2022."""
    has_sinks: bool = False
    """`attend` is given `sinks`: one more score for each head, whose weight goes nowhere."""
    value_size: int | None = None
    """None: values are vectors of their own, as long as keys. Else a value is the first so many
    numbers of its key, the cache `shares_values`, and `attend` returns [T, H, value_size].
    DeepSeek-AI, "DeepSeek-V2", 2024 (multi-head latent attention)."""

    @property
    def out_size(self) -> int:
        """Numbers of a value, and of what attention gives of a head."""
        return self.head_size if self.value_size is None else self.value_size


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A padded step size that a backend captures once."""

    num_tokens: int
    num_requests: int
    num_blocks: int
    max_query_len: int
    """Tokens that one request may compute: 1 in a bucket for decodes alone."""


@dataclass(slots=True, kw_only=True)
class StepMeta:
    """Which tokens, requests and KV blocks one step is about; built once, shared by all layers.

    Requests with one query token come first. Padding is data: pad tokens have a slot in block 0
    (the null block, never allocated), pad requests repeat the last query_start_loc and have
    seq_len 0. The fields on the host let a backend plan without asking the device.
    """

    positions: torch.Tensor
    """int32 [T]: place of each token in its request, from 0."""
    slot_mapping: torch.Tensor
    """int32 [T]: where its key and value go, block * B + offset."""
    query_start_loc: torch.Tensor
    """int32 [S + 1]: request i owns tokens query_start_loc[i] to query_start_loc[i + 1]."""
    seq_lens: torch.Tensor
    """int32 [S]: context length of each request, this step's tokens included."""
    block_table: torch.Tensor
    """int32 [S, MB]: physical block of each logical block; entries past seq_len are 0."""
    logits_rows: torch.Tensor
    """int32 [R]: tokens whose logits, or hidden states, are wanted."""
    host_query_start_loc: np.ndarray
    """query_start_loc on the host."""
    host_seq_lens: np.ndarray
    """seq_lens on the host."""
    num_decodes: int
    """Requests [0, num_decodes) have exactly one query token."""
    max_query_len: int
    max_seq_len: int
    token_types: torch.Tensor | None = None
    """int32 [T]: 1 for tokens of the second text of a pair, for encoders; None for decoders."""
    bucket: Bucket | None = None
    """The padded size, None where steps are not padded."""
    plan: dict[Any, Any] = field(default_factory=dict)
    """Filled by `Backend.prepare` for itself: split of the work, launch geometry."""


@dataclass(slots=True, kw_only=True)
class Penalties:
    """Penalties on tokens that were seen before; applied before the temperature."""

    prompt_ids: torch.Tensor
    """int32 [R, Lp]: prompt tokens, padded with -1."""
    output_ids: torch.Tensor
    """int32 [R, Lo]: generated tokens, padded with -1."""
    presence: torch.Tensor
    """float32 [R]"""
    frequency: torch.Tensor
    """float32 [R]"""
    repetition: torch.Tensor
    """float32 [R]"""


@dataclass(slots=True, kw_only=True)
class LogitBias:
    """Sparse additions to the logits; -inf forbids a token."""

    rows: torch.Tensor
    """int32 [N]"""
    token_ids: torch.Tensor
    """int32 [N]"""
    values: torch.Tensor
    """float32 [N]"""


@dataclass(slots=True, kw_only=True)
class SampleParams:
    """How to draw a token from each row of logits, vectorised over the batch.

    The order is: penalties, bias, allowed mask, then (unless greedy) temperature, min_p, top_k,
    top_p, and the largest of logit + Gumbel noise. A threshold keeps its ties; an argmax takes
    the lowest id. Row r's noise for token v is -log(-log(u)), u = ((x >> 9) + 0.5) * 2^-23 in
    float32, x = word v % 4 of Philox4x32-10 with key = seed[r] (low word first) and counter =
    (v // 4, 0, position[r] low word, position[r] high word).
    """

    temperature: torch.Tensor
    """float32 [R]: 0 is greedy."""
    top_k: torch.Tensor
    """int32 [R]: 0 is off."""
    top_p: torch.Tensor
    """float32 [R]: 1 is off."""
    min_p: torch.Tensor
    """float32 [R]: 0 is off."""
    seed: torch.Tensor
    """int64 [R]"""
    position: torch.Tensor
    """int64 [R]: place of the drawn token in its request."""
    is_greedy: bool
    """Every temperature is 0 (known on the host: it may change the captured step)."""
    has_filters: bool
    """Some row has top_k, top_p or min_p."""
    penalties: Penalties | None = None
    bias: LogitBias | None = None
    allowed: torch.Tensor | None = None
    """int32 [R, ceil(V / 32)]: bit v % 32 of word v // 32 is 1 where token v may be drawn."""
    targets: torch.Tensor | None = None
    """int32 [R]: where >= 0, nothing is drawn: the row reports this token (prompt logprobs)."""
    num_logprobs: int | None = None
    """None: no logprobs; k: the k most likely tokens' as well as the drawn one's."""


@dataclass(slots=True, kw_only=True)
class SampleOutput:
    """What came of each row. Logprobs are of the raw logits, before penalties and temperature."""

    token_ids: torch.Tensor
    """int32 [R]; -1 where the row's logits, after penalties, bias and mask, hold a NaN or nothing
    but -inf: no token can be drawn, and no other row is affected."""
    logprobs: torch.Tensor | None = None
    """float32 [R], where asked for."""
    ranks: torch.Tensor | None = None
    """int32 [R]: 1 is the most likely token."""
    top_ids: torch.Tensor | None = None
    """int32 [R, k], most likely first, ties to the lowest id; a captured step may give more."""
    top_logprobs: torch.Tensor | None = None
    """float32 [R, k]"""
    states: torch.Tensor | None = None
    """float32 [P, C], where hidden states were asked for, or [P, N]: what a classifier made of
    them."""


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """All a step reads besides weights and KV cache."""

    token_ids: torch.Tensor
    """int32 [T]; where `previous_rows` is >= 0 the value is not looked at."""
    meta: StepMeta
    sample: SampleParams
    previous_ids: torch.Tensor | None = None
    """int32 [R']: ids that the step before drew, still on the device; None in a step that
    depends on none."""
    previous_rows: torch.Tensor | None = None
    """int32 [T]: row of `previous_ids` that holds this token, or -1."""
    num_states: int = 0
    """P: the last so many of meta.logits_rows give out their hidden states, and draw nothing."""


StepFn: TypeAlias = Callable[[Weights, KV, StepInputs], tuple[KV, SampleOutput]]
"""One step from token ids to drawn ids: what `compile` captures. No output shape and no branch
in it depends on a value on the device."""


class HostFuture(Protocol):
    """A device-to-host copy under way."""

    def done(self) -> bool:
        """True once `result` would not wait."""
        ...

    def result(self) -> np.ndarray:
        """The values; waits for the device. Raises `BackendError` if the step failed."""
        ...


# -- the device -------------------------------------------------------------------------------


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


# -- finding one ------------------------------------------------------------------------------


def find_backends() -> dict[str, type[Backend] | Exception]:
    """Every installed backend's class by name; an exception where it could not be imported."""
    found: dict[str, type[Backend] | Exception] = {}
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            found[entry_point.name] = entry_point.load()
        except Exception as error:  # a broken third-party backend must not hide the others
            found[entry_point.name] = error
    return found


def report_backends() -> dict[str, DeviceReport]:
    """What each installed backend found here, best first as `auto` would take them."""
    found = find_backends()

    def rank(name: str) -> int:
        backend = found[name]
        return -100 if isinstance(backend, Exception) else backend.rank

    return {name: _report(found[name]) for name in sorted(found, key=lambda n: (-rank(n), n))}


def choose_backend() -> str | None:
    """What `auto` means here: the available backend of the highest rank; None if there is none."""
    found = find_backends()
    for name, report in report_backends().items():
        backend = found[name]
        if report.is_available and not isinstance(backend, Exception) and backend.rank >= 0:
            return name
    return None


def load_backend(device: str = "auto") -> Backend:
    """The backend called `device`, started; auto: the available one of the highest rank."""
    found = find_backends()
    reports = report_backends()
    available = sorted(name for name, report in reports.items() if report.is_available)
    if device == "auto":
        chosen = choose_backend()
        if chosen is None:
            raise BackendUnavailable("auto", "no backend found a device it can use", available)
        device = chosen
    if not device:
        raise ConfigError("device must not be empty: auto, or a name that `portalm devices` lists")
    if device not in found:
        raise BackendUnavailable(
            device,
            f"no installed package brings a backend of that name (entry-point group "
            f"{ENTRY_POINT_GROUP!r}; installed: {', '.join(sorted(found)) or 'none'})",
            available,
        )
    backend = found[device]
    if isinstance(backend, Exception) or not reports[device].is_available:
        raise BackendUnavailable(device, reports[device].summary, available)
    return backend()


def _report(backend: type[Backend] | Exception) -> DeviceReport:
    if isinstance(backend, Exception):
        return DeviceReport(
            is_available=False,
            summary=f"its package does not import ({type(backend).__name__}: {backend})",
        )
    try:
        return backend.find()
    except Exception as error:  # it must never raise; one that does must not hide the others
        return DeviceReport(
            is_available=False, summary=f"it cannot tell ({type(error).__name__}: {error})"
        )
