"""NullBackend: a device that computes nothing and checks everything it is fed.

It draws tokens by a formula that a test can work out, so that a step fed with the wrong tokens,
positions or blocks shows as a wrong chain or as an error. It is synchronous, or runs steps on a
stream of its own like an accelerator: late, in order, with faults where a test wants them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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
    PackedWeight,
    SampleOutput,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.errors import BackendError, BackendErrorKind
from portalm_backends.portable.backend import DoneFuture, TorchBackend

_DTYPES = frozenset({"float32", "float16", "bfloat16"})


def next_id(token_id: int, position: int, vocab_size: int) -> int:
    """The token that this device draws behind `token_id` at `position`.

    Tokens 0 to 2 are never drawn: they end answers in many vocabularies.
    """
    mixed = (token_id * 2654435761 + position * 40503 + 12345) & 0xFFFFFFFF
    return 3 + (mixed >> 7) % (vocab_size - 3)


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
    ) -> None:
        """A device as slow and as faulty as a test needs.

        Args:
            latency_s: seconds that a step takes.
            max_steps_in_flight: 1: a step is done when its call returns; 2 or more: steps run in
                order on a thread of their own.
            fail_at_step: this step (from 0) raises, once.
            fail_kind: what it raises.
        """
        super().__init__()
        self.capabilities = Capabilities(
            dtypes=_DTYPES,
            kv_dtypes=_DTYPES,
            features=frozenset({"sliding_window", "soft_cap", "batch_invariant"}),
            max_steps_in_flight=max_steps_in_flight,
        )
        self.num_steps = 0
        self._latency_s = latency_s
        self._fail_at_step = fail_at_step
        self._fail_kind = fail_kind
        self._vocab_size = 0
        self._block_size = 0
        self._stream = ThreadPoolExecutor(1) if max_steps_in_flight > 1 else None

    @classmethod
    def find(cls) -> DeviceReport:
        """Always there."""
        return DeviceReport(
            is_available=True, summary="computes nothing, answers at once; for tests of the rest"
        )

    def memory(self) -> MemInfo:
        """Sixteen GiB that nobody uses."""
        return MemInfo(total=16 << 30, free=16 << 30, host_shared=False)

    # -- nothing is stored --------------------------------------------------------------------

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """What a real device would need."""
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * spec.head_size * 2

    def kv_alloc(self, spec: KVSpec, num_blocks: int) -> KV:
        """The number of blocks: all there is to know."""
        self._block_size = spec.block_size
        return num_blocks

    def kv_write(
        self, kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
    ) -> KV:
        """Nothing is written."""
        return kv

    def kv_copy(self, kv: KV, src: torch.Tensor, dst: torch.Tensor) -> KV:
        """Nothing is copied; blocks that do not exist are found out."""
        for name, blocks in (("source", src), ("destination", dst)):
            if ((blocks < 1) | (blocks >= kv)).any():
                raise BackendError("shape", f"kv_copy: {name} blocks {blocks.tolist()} of {kv}")
        return kv

    def attend(
        self, kv: KV, layer: int, query: torch.Tensor, meta: StepMeta, spec: AttentionSpec
    ) -> torch.Tensor:
        """The query itself."""
        return query

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """The shape; the head has the most rows, which are the vocabulary."""
        self._vocab_size = max(self._vocab_size, weight.shape[0])
        return weight.shape

    # -- steps --------------------------------------------------------------------------------

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """A step that looks at its inputs and draws by `next_id`; `fn` never runs."""
        super().compile(fn, bucket, example)
        return self._step

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        """Check that slots, positions, lengths and blocks agree."""
        _check_meta(meta, self._block_size)
        return meta

    def _step(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        number = self.num_steps
        self.num_steps += 1
        if int(inputs.meta.block_table.max()) >= kv:
            raise BackendError("shape", f"block {int(inputs.meta.block_table.max())} of {kv}")
        # what a device would have on it: filled when the stream gets there
        token_ids = torch.full((len(inputs.meta.logits_rows),), -1, dtype=torch.int32)

        def compute() -> None:
            if self._latency_s:
                time.sleep(self._latency_s)
            if number == self._fail_at_step:
                raise BackendError(self._fail_kind, f"injected fault at step {number}")
            token_ids.copy_(self._draw(inputs))

        if self._stream is None:
            compute()
        else:
            self._last = self._stream.submit(compute)
        output = SampleOutput(token_ids=token_ids)
        if inputs.sample.num_logprobs is not None:
            _add_even_logprobs(output, self._vocab_size, inputs.sample.num_logprobs)
        return kv, output

    def _draw(self, inputs: StepInputs) -> torch.Tensor:
        """The drawn ids, int32 [R]."""
        token_ids = inputs.token_ids
        if inputs.previous_ids is not None and inputs.previous_rows is not None:
            rows = inputs.previous_rows
            drawn = inputs.previous_ids[rows.clamp(min=0).long()]
            token_ids = torch.where(rows >= 0, drawn, token_ids)
        rows_wanted = inputs.meta.logits_rows.long()
        mixed = token_ids[rows_wanted].long() * 2654435761
        mixed += inputs.meta.positions[rows_wanted].long() * 40503 + 12345
        drawn = 3 + ((mixed & 0xFFFFFFFF) >> 7) % (self._vocab_size - 3)
        if inputs.sample.targets is not None:
            drawn = torch.where(inputs.sample.targets >= 0, inputs.sample.targets, drawn)
        return drawn.to(torch.int32)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """Done when the stream has come to it."""
        if self._stream is None:
            return DoneFuture(x.numpy())
        return _StreamFuture(self._last, lambda: x.numpy())


class _StreamFuture:
    """A copy that is done when its step is."""

    def __init__(self, step: Future[None], value: Callable[[], npt.NDArray[np.generic]]) -> None:
        self._step = step
        self._value = value

    def done(self) -> bool:
        return self._step.done()

    def result(self) -> npt.NDArray[np.generic]:
        self._step.result()
        return self._value()


def _add_even_logprobs(output: SampleOutput, vocab_size: int, num_top: int) -> None:
    """Every token is as likely as any other."""
    num_rows = len(output.token_ids)
    logprob = -float(np.log(vocab_size))
    output.logprobs = torch.full((num_rows,), logprob)
    output.ranks = torch.ones(num_rows, dtype=torch.int32)
    output.top_ids = torch.arange(num_top, dtype=torch.int32).repeat(num_rows, 1)
    output.top_logprobs = torch.full((num_rows, num_top), logprob)


def _check_meta(meta: StepMeta, block_size: int) -> None:
    """Raise `BackendError` of kind shape where the step contradicts itself."""
    loc = torch.from_numpy(meta.host_query_start_loc).long()
    lens = torch.from_numpy(meta.host_seq_lens).long()
    lengths = loc[1:] - loc[:-1]
    num_tokens = int(loc[-1])
    request = torch.repeat_interleave(torch.arange(len(lens)), lengths)
    within = torch.arange(num_tokens) - loc[request]
    positions = lens[request] - lengths[request] + within
    blocks = meta.block_table[request, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    for name, actual, expected in (
        ("positions", meta.positions[:num_tokens].long(), positions),
        ("slot_mapping", meta.slot_mapping[:num_tokens].long(), slots),
    ):
        if not torch.equal(actual, expected):
            raise BackendError("shape", f"{name} {actual.tolist()}, expected {expected.tolist()}")
    if num_tokens and int(blocks.min()) < 1:
        raise BackendError("shape", "a token would be written to the null block")
    if len(set(slots.tolist())) != num_tokens:
        raise BackendError("shape", "two tokens would be written to one slot")
    if bool((lengths[: meta.num_decodes] != 1).any()):
        raise BackendError("shape", f"the first {meta.num_decodes} requests are not all decodes")
