"""Captured steps: which bucket a step is padded to, and which capture runs it.

Where every step must be padded (`static_shapes`), all buckets are captured before service.
Elsewhere they are captured during service, one by one between steps, and a step that fits no
captured bucket runs uncaptured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from portalm.backend import Backend, Bucket, StepFn, StepInputs
from portalm.errors import ConfigError
from portalm.runner.input_batch import PaddedShape


@dataclass(frozen=True, slots=True)
class CaptureKey:
    """Every host-side property that changes which operations a step runs."""

    bucket: Bucket | None
    num_rows: int | None
    """Rows of logits, where steps must be padded."""
    is_greedy: bool
    has_filters: bool
    has_penalties: bool
    has_bias: bool
    has_mask: bool
    has_targets: bool
    num_logprobs: int | None
    reads_previous: bool
    num_states: int


class StepGraphs:
    """Captured steps, one per bucket and kind of sampling."""

    def __init__(
        self,
        backend: Backend,
        step: StepFn,
        *,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        max_scored_rows: int,
        samples: bool,
        enforce_eager: bool,
    ) -> None:
        """Choose the buckets; nothing is captured yet.

        Args:
            backend: captures steps, unless `enforce_eager`.
            step: the whole step as a function.
            max_tokens: maximum number of tokens in a step.
            max_requests: maximum number of requests in a step.
            max_blocks: maximum number of KV blocks of a request.
            max_scored_rows: maximum number of prompt tokens in a step whose logprobs are computed.
            samples: False for models that sample no tokens (encoders).
            enforce_eager: run `step` uncaptured (still padded, where the device needs it).
        """
        self._backend = backend
        self._step = step
        self._enforce_eager = enforce_eager
        self._max_scored_rows = max_scored_rows
        self._samples = samples
        self._captured: dict[CaptureKey, StepFn] = {}
        self._sealed = ExitStack()
        buckets = backend.buckets(max_tokens, max_requests, max_blocks)
        self.buckets: Sequence[Bucket] | None = None if buckets is None else sorted(buckets)
        self._must_pad = backend.capabilities.static_shapes
        self._uncaptured: list[Bucket] = []
        """Buckets still to be captured, in ascending order."""
        self._usable: list[Bucket] = []
        """Buckets that a step may be padded to, in ascending order."""
        if self.buckets is not None and self._must_pad:
            self._usable = list(self.buckets)
        if self.buckets is not None and not enforce_eager and (samples or self._must_pad):
            self._uncaptured = list(self.buckets)

    def shape(
        self,
        num_tokens: int,
        num_requests: int,
        num_blocks: int,
        num_rows: int,
        num_states: int = 0,
        *,
        max_query_len: int,
    ) -> tuple[Bucket | None, PaddedShape | None]:
        """The smallest usable bucket that holds a step, and its padded shape; None: do not pad."""
        for bucket in self._usable:
            shape = self._fitting(bucket, num_rows, num_states)
            if (
                shape is not None
                and bucket.num_tokens >= num_tokens
                and bucket.num_requests >= num_requests
                and bucket.num_blocks >= num_blocks
                and bucket.max_query_len >= max_query_len
            ):
                return bucket, shape
        if self._must_pad:
            raise ConfigError(
                f"no bucket of the backend fits a step of {num_tokens} tokens, {num_requests} "
                f"requests of at most {max_query_len} tokens and {num_blocks} blocks per request; "
                f"the largest is {self._usable[-1]}"
            )
        return None, None

    # -- capturing -----------------------------------------------------------------------------

    def next_to_capture(self) -> Bucket | None:
        """The largest bucket that is not captured yet: smaller ones can then reuse its memory."""
        return self._uncaptured[-1] if self._uncaptured else None

    def note_captured(self) -> None:
        """Mark the bucket of `next_to_capture()` as captured: steps may use it from now on."""
        bucket = self._uncaptured.pop()
        if not self._must_pad:
            self._usable.insert(0, bucket)

    def shapes(self, bucket: Bucket) -> list[PaddedShape]:
        """The padded shapes that steps of `bucket` may have, the usual one first."""
        shapes = [_usual(bucket)] if self._samples else []
        if bucket.max_query_len > 1 and self._must_pad:
            shapes.append(self._wide(bucket))
        return shapes

    def _fitting(self, bucket: Bucket, num_rows: int, num_states: int) -> PaddedShape | None:
        """The shape of `bucket` that holds this many rows of logits and of hidden states.

        None where no captured shape does: prompt logprobs and pooled prompts run uncaptured,
        unless every step must be padded.
        """
        if self._samples and num_rows <= bucket.num_requests and not num_states:
            return _usual(bucket)
        return self._wide(bucket) if bucket.max_query_len > 1 and self._must_pad else None

    def _wide(self, bucket: Bucket) -> PaddedShape:
        """The shape with rows for prompt logprobs and for the hidden state of every token."""
        rows = bucket.num_requests + min(bucket.num_tokens, self._max_scored_rows)
        return PaddedShape(
            bucket.num_tokens,
            bucket.num_requests,
            bucket.num_blocks,
            rows if self._samples else 0,
            bucket.num_tokens,
        )

    def give_up(self) -> None:
        """Stop capturing: steps that fit no captured bucket run uncaptured."""
        self._uncaptured.clear()

    def step_for(self, inputs: StepInputs) -> StepFn:
        """The function that runs `inputs`: a capture, made on first use, or the uncaptured step."""
        is_unpadded = self.buckets is not None and inputs.meta.bucket is None
        if self._enforce_eager or is_unpadded:
            return self._step
        key = _key(inputs, takes_any_sampling=self._must_pad)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._backend.compile(self._step, inputs.meta.bucket, inputs)
            self._captured[key] = captured
        return captured

    def seal(self) -> None:
        """Make any further capture an error: everything that service needs is captured by now."""
        self._sealed.enter_context(self._backend.seal())

    def unseal(self) -> None:
        """Allow captures again."""
        self._sealed.close()


def _usual(bucket: Bucket) -> PaddedShape:
    """The shape with one row of logits per request."""
    return PaddedShape(
        bucket.num_tokens, bucket.num_requests, bucket.num_blocks, bucket.num_requests
    )


def _key(inputs: StepInputs, *, takes_any_sampling: bool) -> CaptureKey:
    """The capture that `inputs` needs.

    Where steps must be padded, one capture per shape supports every kind of sampling.
    """
    bucket, sample = inputs.meta.bucket, inputs.sample
    num_rows = len(inputs.meta.logits_rows)
    plain = CaptureKey(None, None, False, False, False, False, False, False, None, False, 0)
    if bucket is None:  # one capture serves all sizes and kinds of sampling
        return plain
    if takes_any_sampling:
        return replace(plain, bucket=bucket, num_rows=num_rows, num_states=inputs.num_states)
    return CaptureKey(
        bucket=bucket,
        num_rows=num_rows,
        is_greedy=sample.is_greedy,
        has_filters=sample.has_filters,
        has_penalties=sample.penalties is not None,
        has_bias=sample.bias is not None,
        has_mask=sample.allowed is not None,
        has_targets=sample.targets is not None,
        num_logprobs=sample.num_logprobs,
        reads_previous=inputs.previous_ids is not None,
        num_states=inputs.num_states,
    )
