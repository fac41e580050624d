"""NullBackend: a simulated device that computes nothing and checks all of its inputs.

It samples tokens by a formula that a test can compute, so that wrong tokens, positions or blocks in
a step show up as wrong tokens or as an error. A token's hidden state starts with its id and its
position. The device is synchronous, or runs steps like an accelerator: on a stream, in order, with
latency and with injected faults.
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
    """Return the token that this device samples after `token_id` at `position`.

    Tokens 0 to 2 are never sampled, because they end answers in many vocabularies.
    """
    mixed = (token_id * 2654435761 + position * 40503 + 12345) & 0xFFFFFFFF
    return _FIRST_ID + (mixed >> 7) % (vocab_size - _FIRST_ID)


class NullBackend(TorchBackend):
    """Runs steps at once, or after `latency_s` on a separate stream."""

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
        """Create a device with latency and faults.

        Args:
            latency_s: seconds per step.
            max_steps_in_flight: 1: a step is done when its call returns. 2 or more: steps run in
                order on a separate thread, and errors are raised by the future.
            fail_at_step: number of the step that raises, from 0; an engine's first step warms up.
            fail_kind: kind of the `BackendError` that it raises.
            reads_cache: compute the sampled token from the `context_hash` of all tokens in the
                request's blocks instead of its last token alone, so that one wrong block changes
                all tokens after it.
        """
        super().__init__()
        self.capabilities = Capabilities(
            dtypes=_DTYPES,
            kv_dtypes=frozenset({*_DTYPES, *SCALED_KV_DTYPES}),
            features=frozenset({"sliding_window", "soft_cap", "shared_values", "batch_invariant"}),
            max_steps_in_flight=max_steps_in_flight,
        )
        self.num_steps = 0
        """Number of steps called so far."""
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
        """Report the device, which is always available."""
        return DeviceReport(
            is_available=True, summary="simulated device that computes nothing, for tests"
        )

    def memory(self) -> MemInfo:
        """Return 16 GiB, all free."""
        return MemInfo(total=16 << 30, free=16 << 30, host_shared=False)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Return a future that is done when the most recent step is."""
        if self._last_step is None:
            return DoneFuture(x.numpy())
        return _StepFuture(self._last_step, x)

    # -- KV cache: token ids instead of keys and values ----------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Return the bytes that a real device would need."""
        return kv_codes.bytes_per_block(spec)

    def _kv_alloc(self, spec: KVSpec, num_blocks: int) -> NullKV:
        """Allocate a cache of token ids and positions."""
        self._block_size = spec.block_size
        return NullKV(num_blocks, spec.block_size)

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Do nothing: the step writes its token ids once for all layers."""
        return kv

    def kv_copy(self, kv: NullKV, src: torch.Tensor, dst: torch.Tensor) -> NullKV:
        """Enqueue the copy of blocks; raise at once for blocks that do not exist."""
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
        """Raise `Unsupported`: the cache holds token ids."""
        raise Unsupported("the null device stores no keys and values to export")

    def kv_import(self, kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
        """Raise `Unsupported`: the cache holds token ids."""
        raise Unsupported("the null device cannot import keys and values")

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
        """Return zeros [T, N], only while `compile` traces a step: there are no real results."""
        if not self._is_tracing:
            raise Unsupported(
                "the null device only runs captured steps: turn enforce_eager off, or use "
                "--device reference"
            )
        return x.new_zeros(len(x), weight[0])

    def pack_heads(self, weight: torch.Tensor) -> torch.Size:
        """Keep only the shape."""
        return weight.shape

    def linear_heads(self, x: torch.Tensor, weight: torch.Size) -> torch.Tensor:
        """Return zeros [T, H, N]."""
        return x.new_zeros(len(x), weight[0], weight[1])

    def logits(self, x: torch.Tensor, weight: torch.Size) -> torch.Tensor:
        """Return zeros [R, V], and record the vocabulary size."""
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
        """Return the query, cut to the size of a value."""
        return query[..., : spec.out_size]

    # -- steps ---------------------------------------------------------------------------------

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Check that slots, positions, lengths and blocks are consistent."""
        if not self._block_size:
            raise Unsupported("the null device cannot run encoders: it samples from its KV cache")
        check_meta(meta, self._block_size)
        return meta

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """Return a step that samples by `next_id`; `fn` runs once, to learn its shapes."""
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
        # -1 until the stream reaches this step, as on a device
        num_rows = len(inputs.meta.logits_rows) - inputs.num_states
        token_ids = torch.full((num_rows,), -1, dtype=torch.int32)

        def compute() -> None:
            time.sleep(self._latency_s)
            sampled = self._sample_ids(kv, inputs)
            if number == self._fail_at_step:
                raise BackendError(self._fail_kind, f"injected fault at step {number}")
            token_ids.copy_(sampled)
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
                f"the null device samples token ids from {_FIRST_ID} up; the vocabulary has only "
                f"{self._vocab_size} tokens"
            )
        return output

    def _enqueue(self, work: Callable[[], None]) -> Future[None] | None:
        """Run `work` now, or after everything that is on the stream."""
        if self._stream is not None:
            return self._stream.submit(work)
        work()
        return None

    def _sample_ids(self, kv: NullKV, inputs: StepInputs) -> torch.Tensor:
        """Sample int32 [R]. This runs on the stream: it reads no buffer that the host reuses."""
        meta = inputs.meta
        token_ids = inputs.token_ids
        if inputs.previous_ids is not None and inputs.previous_rows is not None:
            rows = inputs.previous_rows
            previous = inputs.previous_ids[rows.clamp(min=0).long()]
            token_ids = torch.where(rows >= 0, previous, token_ids)
        kv.write(meta.slot_mapping.numpy(), token_ids.numpy(), meta.positions.numpy())
        hashes = torch.from_numpy(kv.read(meta.block_table.numpy(), meta.seq_lens.numpy()))

        wanted = meta.logits_rows[: len(meta.logits_rows) - inputs.num_states].long()
        last = token_ids[wanted].long()
        if self._reads_cache:
            request = torch.searchsorted(meta.query_start_loc[1:].long(), wanted, right=True)
            last = hashes[request]
        mixed = last * 2654435761 + meta.positions[wanted].long() * 40503 + 12345
        sampled = _FIRST_ID + ((mixed & 0xFFFFFFFF) >> 7) % (self._vocab_size - _FIRST_ID)
        if inputs.sample.targets is not None:
            sampled = torch.where(inputs.sample.targets >= 0, inputs.sample.targets, sampled)
        return sampled.to(torch.int32)


class _StepFuture:
    """A copy to the host of a result of a step that may still run."""

    def __init__(self, step: Future[None], value: torch.Tensor) -> None:
        self._step = step
        self._value = value

    def done(self) -> bool:
        """Return True once the step has ended or failed."""
        return self._step.done()

    def result(self) -> npt.NDArray[np.generic]:
        """Return the values; raise the step's exception if it failed."""
        self._step.result()
        return self._value.numpy()


def _add_even_logprobs(output: SampleOutput, vocab_size: int, num_top: int) -> None:
    """Add logprobs in which all tokens are equally likely."""
    num_rows = len(output.token_ids)
    logprob = -float(np.log(vocab_size))
    output.logprobs = torch.full((num_rows,), logprob)
    output.ranks = torch.ones(num_rows, dtype=torch.int32)
    output.top_ids = torch.arange(num_top, dtype=torch.int32).repeat(num_rows, 1)
    output.top_logprobs = torch.full((num_rows, num_top), logprob)
