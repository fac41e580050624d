"""NullBackend: a device that computes nothing and checks everything it is fed.

It draws tokens by a formula that a test can work out, so that a step fed with the wrong tokens,
positions or blocks shows as a wrong chain or as an error; a token's hidden state begins with its id
and its position. It is synchronous, or runs steps on a stream of its own like an accelerator: late,
in order, with a fault where a test wants one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    KV,
    SCALED_KV_DTYPES,
    AttentionSpec,
    Bucket,
    Capabilities,
    DeviceReport,
    HostFuture,
    KVSpec,
    MemInfo,
    QuantizedWeight,
    SampleOutput,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.errors import BackendError, BackendErrorKind, Unsupported
from portalm_backends.null.cache import NullKV
from portalm_backends.null.checks import check_inputs, check_meta
from portalm_backends.portable import kv_codes
from portalm_backends.portable.backend import DoneFuture, TorchBackend

_DTYPES = frozenset({"float32", "float16", "bfloat16"})
_FIRST_ID = 3


def next_id(token_id: int, position: int, vocab_size: int) -> int:
    """The token that this device draws behind `token_id` at `position`.

    Tokens 0 to 2 are never drawn: they end answers in many vocabularies.
    """
    mixed = (token_id * 2654435761 + position * 40503 + 12345) & 0xFFFFFFFF
    return _FIRST_ID + (mixed >> 7) % (vocab_size - _FIRST_ID)


class NullBackend(TorchBackend):
    """Answers at once, or after `latency_s` on a stream of its own."""

    name = "null"
    rank = -10

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        max_steps_in_flight: int = 1,
        fail_at_step: int | None = None,
        fail_kind: BackendErrorKind = "oom",
        reads_cache: bool = False,
    ) -> None:
        """A device as slow and as faulty as a test needs.

        Args:
            latency_s: seconds that a step takes.
            max_steps_in_flight: 1: a step is done when its call returns; 2 or more: steps run in
                order on a thread of their own, and what goes wrong shows in the future.
            fail_at_step: this step (from 0; an engine's first one warms up) raises, once.
            fail_kind: what it raises.
            reads_cache: draw behind the `context_hash` of all tokens that the request's blocks
                hold, instead of behind its last token alone: one wrong block, one wrong chain.
        """
        super().__init__()
        self.capabilities = Capabilities(
            dtypes=_DTYPES,
            kv_dtypes=frozenset({*_DTYPES, *SCALED_KV_DTYPES}),
            features=frozenset({"sliding_window", "soft_cap", "shared_values", "batch_invariant"}),
            max_steps_in_flight=max_steps_in_flight,
        )
        self.num_steps = 0
        """Steps called so far."""
        self._latency_s = latency_s
        self._fail_at_step = fail_at_step
        self._fail_kind = fail_kind
        self._reads_cache = reads_cache
        self._block_size = 0
        self._vocab_size = 0
        self._is_tracing = False
        self._stream = ThreadPoolExecutor(1, "null") if max_steps_in_flight > 1 else None
        self._last_step: Future[None] | None = None

    @classmethod
    def find(cls) -> DeviceReport:
        """Always there."""
        return DeviceReport(
            is_available=True, summary="computes nothing, answers at once; for tests of the rest"
        )

    def memory(self) -> MemInfo:
        """Sixteen GiB that nobody uses."""
        return MemInfo(total=16 << 30, free=16 << 30, host_shared=False)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Done when the step that was called last is."""
        if self._last_step is None:
            return DoneFuture(x.numpy())
        return _StepFuture(self._last_step, x)

    # -- KV cache: token ids instead of keys and values ----------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """What a real device would need."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> NullKV:
        """Allocate a cache of token ids and positions."""
        self._block_size = spec.block_size
        return NullKV(num_blocks, spec.block_size)

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Nothing: the step writes its token ids once for all layers."""
        return kv

    def kv_copy(self, kv: NullKV, src: torch.Tensor, dst: torch.Tensor) -> NullKV:
        """Copy blocks on the stream. Blocks that do not exist are an error at once."""
        for name, blocks in (("source", src), ("destination", dst)):
            if bool(((blocks < 1) | (blocks >= kv.num_blocks)).any()):
                raise BackendError(
                    "shape",
                    f"kv_copy: {name} blocks {blocks.tolist()} are not all among 1 to "
                    f"{kv.num_blocks - 1}",
                )
        self._enqueue(lambda: kv.copy(src.numpy(), dst.numpy()))
        return kv

    def kv_export(self, kv: KV, blocks: torch.Tensor) -> torch.Tensor:
        """Not possible."""
        raise Unsupported("the null device has no keys and values to export")

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """Not possible."""
        raise Unsupported("the null device has no room for keys and values")

    # -- layers: shapes only -------------------------------------------------------------------

    def _pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> torch.Size:
        """Keep only the shape."""
        return weight.shape

    def linear(
        self, x: torch.Tensor, weight: torch.Size, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Zeros [T, N]; refused outside of `compile`, as their answers would mean nothing."""
        if not self._is_tracing:
            raise Unsupported(
                "the null device only runs captured steps: leave enforce_eager off, or use "
                "--device reference"
            )
        return x.new_zeros(len(x), weight[0])

    def pack_heads(self, weight: torch.Tensor) -> torch.Size:
        """The shape."""
        return weight.shape

    def linear_heads(self, x: torch.Tensor, weight: torch.Size) -> torch.Tensor:
        """Zeros [T, H, N]."""
        return x.new_zeros(len(x), weight[0], weight[1])

    def logits(self, x: torch.Tensor, weight: torch.Size) -> torch.Tensor:
        """Zeros [R, V]; this is where the device learns how large the vocabulary is."""
        self._vocab_size = weight[0]
        return self.linear(x.float(), weight)

    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The query itself."""
        return query[..., : spec.out_size]

    # -- steps ---------------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Check that slots, positions, lengths and blocks agree."""
        if not self._block_size:
            raise Unsupported("the null device answers by what its KV cache holds: no encoders")
        check_meta(meta, self._block_size)
        return meta

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """A step that draws by `next_id` from its inputs; `fn` runs once, for its shapes."""
        super().compile(fn, bucket, example)
        return functools.partial(self._step, fn)

    def _step(
        self, fn: StepFn, weights: Weights, kv: NullKV, inputs: StepInputs
    ) -> tuple[NullKV, SampleOutput]:
        number = self.num_steps
        self.num_steps += 1
        states: torch.Tensor | None = None
        if not self._vocab_size or inputs.num_states:
            states = self._trace(fn, weights, kv, inputs).states  # zeros of the right shape
        check_inputs(inputs, kv.num_blocks, self._vocab_size)
        # filled when the stream gets there, as on a device; -1 until then
        num_rows = len(inputs.meta.logits_rows) - inputs.num_states
        token_ids = torch.full((num_rows,), -1, dtype=torch.int32)

        def compute() -> None:
            time.sleep(self._latency_s)
            drawn = self._draw(kv, inputs)
            if number == self._fail_at_step:
                raise BackendError(self._fail_kind, f"injected fault at step {number}")
            token_ids.copy_(drawn)
            if states is not None:
                rows = inputs.meta.logits_rows[-inputs.num_states :].long()
                states[:, 0] = inputs.token_ids[rows]
                states[:, 1] = inputs.meta.positions[rows]

        self._last_step = self._enqueue(compute)
        output = SampleOutput(token_ids=token_ids, states=states)
        if inputs.sample.num_logprobs is not None:
            _add_even_logprobs(output, self._vocab_size, inputs.sample.num_logprobs)
        return kv, output

    def _trace(self, fn: StepFn, weights: Weights, kv: NullKV, inputs: StepInputs) -> SampleOutput:
        self._is_tracing = True
        try:
            _, output = fn(weights, kv, inputs)
        finally:
            self._is_tracing = False
        if self._vocab_size <= _FIRST_ID:
            raise Unsupported(
                f"the null device draws tokens from {_FIRST_ID} up: a vocabulary of "
                f"{self._vocab_size} has none"
            )
        return output

    def _enqueue(self, work: Callable[[], None]) -> Future[None] | None:
        """Run `work` now, or behind all that is on the stream."""
        if self._stream is not None:
            return self._stream.submit(work)
        work()
        return None

    def _draw(self, kv: NullKV, inputs: StepInputs) -> torch.Tensor:
        """The drawn ids, int32 [R]; on the stream, so nothing is read that the host reuses."""
        meta = inputs.meta
        token_ids = inputs.token_ids
        if inputs.previous_ids is not None and inputs.previous_rows is not None:
            rows = inputs.previous_rows
            drawn = inputs.previous_ids[rows.clamp(min=0).long()]
            token_ids = torch.where(rows >= 0, drawn, token_ids)
        kv.write(meta.slot_mapping.numpy(), token_ids.numpy(), meta.positions.numpy())
        hashes = torch.from_numpy(kv.read(meta.block_table.numpy(), meta.seq_lens.numpy()))

        wanted = meta.logits_rows[: len(meta.logits_rows) - inputs.num_states].long()
        last = token_ids[wanted].long()
        if self._reads_cache:
            request = torch.searchsorted(meta.query_start_loc[1:].long(), wanted, right=True)
            last = hashes[request]
        mixed = last * 2654435761 + meta.positions[wanted].long() * 40503 + 12345
        drawn = _FIRST_ID + ((mixed & 0xFFFFFFFF) >> 7) % (self._vocab_size - _FIRST_ID)
        if inputs.sample.targets is not None:
            drawn = torch.where(inputs.sample.targets >= 0, inputs.sample.targets, drawn)
        return drawn.to(torch.int32)


class _StepFuture:
    """A copy to the host behind the step that makes it."""

    def __init__(self, step: Future[None], value: torch.Tensor) -> None:
        self._step = step
        self._value = value

    def done(self) -> bool:
        """True once the step is over, well or not."""
        return self._step.done()

    def result(self) -> npt.NDArray[np.generic]:
        """The values; raises what the step raised."""
        self._step.result()
        return self._value.numpy()


def _add_even_logprobs(output: SampleOutput, vocab_size: int, num_top: int) -> None:
    """Every token is as likely as any other."""
    num_rows = len(output.token_ids)
    logprob = -float(np.log(vocab_size))
    output.logprobs = torch.full((num_rows,), logprob)
    output.ranks = torch.ones(num_rows, dtype=torch.int32)
    output.top_ids = torch.arange(num_top, dtype=torch.int32).repeat(num_rows, 1)
    output.top_logprobs = torch.full((num_rows, num_top), logprob)
