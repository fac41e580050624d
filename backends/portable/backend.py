"""TorchBackend, the portable base class: torch defaults for the optional methods of `Backend`."""

from __future__ import annotations

import abc
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from portalm.backend import (
    API_VERSION,
    KV,
    AttentionSpec,
    Bucket,
    Capabilities,
    DeviceReport,
    Experts,
    HostFuture,
    KVSpec,
    MemInfo,
    PackedWeight,
    QuantizedWeight,
    SampleOutput,
    SampleParams,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.errors import BackendError, Unsupported
from portalm_backends.portable import encoder, host_memory
from portalm_backends.portable.sampling import sample


class DoneFuture:
    """A copy to the host that is already complete."""

    def __init__(self, value: npt.NDArray[np.generic]) -> None:
        """Wrap a value that is already on the host."""
        self._value = value

    def done(self) -> bool:
        """Return True."""
        return True

    def result(self) -> npt.NDArray[np.generic]:
        """Return the values."""
        return self._value


class TorchBackend(abc.ABC):
    """The portable base class of backends.

    A subclass writes `find`, `memory`, `kv_bytes_per_block`, `_kv_alloc`, `kv_write` and `attend`.
    The defaults of `kv_copy`, `kv_export` and `kv_import` are for a KV handle that is one tensor
    [L, P, NB, B, H_kv, D]; a subclass with another layout overrides those too. Every other method
    may be replaced by a faster one.
    """

    api_version = API_VERSION
    name = "torch"
    rank = -10
    capabilities: Capabilities

    def __init__(self) -> None:
        """Start unsealed."""
        self._is_sealed = False

    @classmethod
    @abc.abstractmethod
    def find(cls) -> DeviceReport:
        """Report whether the device is usable here; must not raise or start the device."""

    # -- device and memory --------------------------------------------------------------------

    def device(self) -> torch.device:
        """Return the host."""
        return torch.device("cpu")

    @abc.abstractmethod
    def memory(self) -> MemInfo:
        """Return total and free bytes."""

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Measure this process's resident memory: right where the device is the host."""
        with host_memory.peak() as used:
            yield used

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy an array, so that the caller may reuse its buffer."""
        return torch.from_numpy(np.ascontiguousarray(host)).to(self.device(), copy=True)

    def step_uploads(self) -> contextlib.AbstractContextManager[None]:
        """Return a context without an effect: `to_device` copies at once."""
        return contextlib.nullcontext()

    def block_table(
        self,
        block_ids: npt.NDArray[np.int32],
        block_starts: npt.NDArray[np.int32],
        width: int,
    ) -> torch.Tensor:
        """Fill a table of zeros, int32 [S, width], with each row's blocks; copy it."""
        table = np.zeros((len(block_starts) - 1, width), np.int32)
        for row, (begin, end) in zip(table, itertools.pairwise(block_starts.tolist()), strict=True):
            row[: end - begin] = block_ids[begin:end]
        return self.to_device(table)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Copy `x` to the host before returning."""
        return DoneFuture(x.cpu().numpy())

    def device_errors(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that translates nothing."""
        return contextlib.nullcontext()

    def use_threads(self, num_threads: int) -> None:
        """Set the size of torch's thread pool, which the whole process shares."""
        torch.set_num_threads(num_threads)

    def one_plus_one(self) -> int:
        """Return 1 + 1 as computed by the device: 2, if it works."""
        return int((torch.ones(1, device=self.device()) + 1).cpu())

    def probe(self, timeout_s: float) -> None:
        """Add two numbers on another thread; wait at most `timeout_s` seconds."""
        failures: list[Exception] = []
        is_over = threading.Event()

        def add() -> None:
            try:
                answer = self.one_plus_one()
                if answer != 2:
                    failures.append(ArithmeticError(f"1 + 1 is {answer}"))
            except Exception as error:  # raised again by the caller below
                failures.append(error)
            is_over.set()

        threading.Thread(target=add, daemon=True).start()
        if not is_over.wait(timeout_s):
            raise BackendError(
                "timeout",
                f"device {self.name} did not answer in {timeout_s} s: another program may be "
                f"using it, or its driver hangs",
            )
        if failures:
            raise BackendError(
                "kernel", f"device {self.name} cannot add two numbers: {failures[0]}"
            ) from failures[0]

    # -- KV cache -----------------------------------------------------------------------------

    @abc.abstractmethod
    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers."""

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """Allocate an uninitialized cache of `num_blocks` blocks, the null block included.

        Raises:
            Unsupported: `capabilities` do not claim a cache of this spec.
            BackendError: of kind oom, with the size, where memory is short.
        """
        if problem := self.capabilities.kv_problem(spec):
            raise Unsupported(f"backend {self.name!r}: {problem}")
        try:
            return self._kv_alloc(spec, num_blocks)
        except (MemoryError, RuntimeError) as error:  # what torch and JAX raise
            size = num_blocks * self.kv_bytes_per_block(spec)
            reason = str(error).partition("\n")[0]
            raise BackendError(
                "oom",
                f"cannot allocate a KV cache of {size / 2**20:.0f} MiB ({reason}): lower "
                f"--gpu-memory-utilization, --kv-cache-memory-bytes, --max-model-len or "
                f"--max-num-seqs",
            ) from error

    @abc.abstractmethod
    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """Allocate a cache of a spec that `capabilities` claim."""

    @abc.abstractmethod
    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Write keys and values, [T, H_kv, D] each, to their slots."""

    def kv_copy(self, kv: KV, src: torch.Tensor, dst: torch.Tensor) -> KV:
        """Copy blocks src[i] to dst[i], int32 [N] each, over all layers."""
        kv[:, :, dst.long()] = kv[:, :, src.long()]
        return kv

    def kv_export(self, kv: KV, blocks: torch.Tensor) -> torch.Tensor:
        """Return blocks int32 [N] as [N, L, P, B, H_kv, D] on the host."""
        wire: torch.Tensor = kv[:, :, blocks.long()].permute(2, 0, 1, 3, 4, 5)
        return wire.cpu().contiguous()

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """Write blocks in the wire layout; another dtype is converted."""
        kv[:, :, blocks.long()] = wire.to(kv).permute(1, 2, 0, 3, 4, 5)
        return kv

    # -- attention ----------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Return `meta` unchanged."""
        return meta

    @abc.abstractmethod
    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of query [T, H, D] over each request's context: [T, H, D]."""

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attention of [T, H, D] within each request; prompts of equal length form one batch.

        It reads prompt lengths on the host: a backend that captures steps overrides this.
        """
        return encoder.attention(query, key, value, meta, spec)

    # -- layers -------------------------------------------------------------------------------

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """Convert a weight [N, K] to the device's layout.

        Raises:
            Unsupported: `capabilities` do not claim the quantization.
        """
        claimed = self.capabilities.quantizations
        for name in (weight.format if isinstance(weight, QuantizedWeight) else None, quantization):
            if name is not None and name not in claimed:
                raise Unsupported(
                    f"backend {self.name!r}: {name} weights are not supported; supported: "
                    f"{', '.join(sorted(claimed)) or 'none'}: choose one with --quantization"
                )
        return self._pack(weight, quantization=quantization, for_logits=for_logits)

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """Convert a weight [N, K] of a claimed quantization; by default, copy it to the device."""
        assert isinstance(weight, torch.Tensor), "a backend that claims quantizations writes _pack"
        return weight.to(self.device())

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [T, K] by weight [N, K] transposed, plus bias [N]: [T, N]."""
        return F.linear(x, weight, bias)

    def pack_heads(self, weight: torch.Tensor) -> PackedWeight:
        """Copy the weight [H, N, K] to the device."""
        return weight.to(self.device())

    def linear_heads(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Multiply x [T, H, K] by weight [H, N, K], head by head: [T, H, N]."""
        return torch.einsum("thk,hnk->thn", x, weight)

    def logits(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Multiply x [R, C] by weight [V, C] transposed in float32: [R, V].

        Both operands are cast up, so that products are exact and their sum is not rounded to the
        weight's dtype, which would turn close logits into ties. This copies the whole weight in
        every step: a device that accumulates in float32 anyway overrides this.
        """
        return F.linear(x.float(), weight.float())

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Look up rows int32 [T] of table [V, C]: [T, C]."""
        return F.embedding(token_ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight.

        Zhang and Sennrich, "Root mean square layer normalization", 2019; rounded where
        transformers rounds.
        """
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (rms_norm(x + residual), x + residual)."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias, rounded to x's dtype once.

        Ba, Kiros and Hinton, "Layer normalization", 2016.
        """
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query [T, H, D] and key [T, H_kv, D] by positions int32 [T].

        Su et al., "RoFormer", 2021. cos_sin is float32 [max_position, rotary_dim].
        """
        turns = cos_sin.index_select(0, positions)[:, None]  # [T, 1, rotary_dim]
        return (
            _rotate(query, turns, is_interleaved=is_interleaved),
            _rotate(key, turns, is_interleaved=is_interleaved),
        )

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
        """Apply `rope`, then `kv_write`: return the cache and the rotated query [T, H, D]."""
        query, key = self.rope(query, key, meta.positions, cos_sin, is_interleaved=is_interleaved)
        return self.kv_write(kv, layer, key, value, meta), query

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x * (1 + erf(x / sqrt(2))) / 2.

        Hendrycks and Gimpel, "Gaussian error linear units", 2016.
        """
        return F.gelu(x)

    def gelu_tanh(self, x: torch.Tensor) -> torch.Tensor:
        """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2.

        The approximation in Hendrycks and Gimpel, "Gaussian error linear units", 2016.
        """
        return F.gelu(x, approximate="tanh")

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu_tanh(gate) * up of [T, 2 I]: [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Apply every expert to every token, with weight 0 for those not chosen: [T, C].

        This keeps shapes independent of the routing. A device without that limit can compute less.
        """
        shares = x.new_zeros((len(x), len(experts.down)), dtype=torch.float32)
        shares = shares.scatter(1, expert_ids.long(), expert_weights)  # [T, E]
        total = x.new_zeros(x.shape, dtype=torch.float32)
        for expert in range(len(experts.down)):
            share = shares[:, expert, None]
            out = self.expert(x, expert, experts).float() * share
            # the output of an expert that was not chosen may have overflowed
            total = total + torch.where(share > 0, out, 0.0)
        return total.to(x.dtype)

    def expert(self, x: torch.Tensor, expert: int, experts: Experts) -> torch.Tensor:
        """Apply one expert to [T, C]."""
        bias, limit = experts.gate_up_bias, experts.swiglu_limit
        gate_up = self.linear(x, experts.gate_up[expert], None if bias is None else bias[expert])
        if limit is None:
            inner = self.silu_mul(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = gate * torch.sigmoid(experts.swiglu_alpha * gate) * (up + 1)
        bias = experts.down_bias
        return self.linear(inner, experts.down[expert], None if bias is None else bias[expert])

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Select rows int32 [R] of x [T, C]: [R, C]."""
        return x.index_select(0, rows)

    # -- execution ----------------------------------------------------------------------------

    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        """Return None: steps of any size run as they are."""
        return None

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Return `fn` itself; refused while sealed, as on devices where a capture takes time."""
        if self._is_sealed:
            raise BackendError(
                "unsupported",
                f"device {self.name} is sealed and cannot capture a step of {bucket}: all steps "
                f"that serving needs must be captured at startup",
            )
        return fn

    def build(
        self,
        steps: Sequence[StepFn],
        weights: Weights,
        kv: KV,
        progress: Callable[[float], None],
        *,
        identity: str | None = None,
    ) -> None:
        """Do nothing: steps need no compilation."""
        progress(1.0)

    @contextlib.contextmanager
    def seal(self) -> Iterator[None]:
        """Make `compile` raise `BackendError` within the context."""
        self._is_sealed = True
        try:
            yield
        finally:
            self._is_sealed = False

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token from each row of float32 logits [R, V]."""
        return sample(logits, params)


def _rotate(x: torch.Tensor, turns: torch.Tensor, *, is_interleaved: bool) -> torch.Tensor:
    """Rotate x [T, H, D] in float32 by cosines, then sines, [T, 1, rotary_dim].

    Dimensions after rotary_dim are unchanged.
    """
    rotary_dim = turns.shape[-1]
    cos, sin = turns.chunk(2, dim=-1)
    turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if is_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)
