"""Captured steps: which bucket a step is padded to, and the capture that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from portalm.backend import Backend, Bucket, StepFn, StepInputs
from portalm.errors import ConfigError
from portalm.runner.input_batch import PaddedShape


@dataclass(frozen=True, slots=True)
class CaptureKey:
    """All on the host that may change what a step computes."""

    bucket: Bucket | None
    num_rows: int | None
    """Rows of logits, where steps are padded."""
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
    """One captured step per bucket and kind of sampling, captured when first needed."""

    def __init__(
        self,
        backend: Backend,
        step: StepFn,
        *,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        enforce_eager: bool,
    ) -> None:
        """Nothing is captured yet.

        Args:
            backend: captures, if `enforce_eager` is False.
            step: the whole step as a function.
            max_tokens: of one step.
            max_requests: of one step.
            max_blocks: of one request.
            enforce_eager: run `step` as it is (padded all the same, where the device needs it).
        """
        self._backend = backend
        self._step = step
        self._enforce_eager = enforce_eager
        self._captured: dict[CaptureKey, StepFn] = {}
        self._sealed = ExitStack()
        buckets = backend.buckets(max_tokens, max_requests, max_blocks)
        self.buckets: Sequence[Bucket] | None = None if buckets is None else sorted(buckets)

    def shape(
        self,
        num_tokens: int,
        num_requests: int,
        num_blocks: int,
        num_rows: int,
        num_states: int = 0,
    ) -> tuple[Bucket | None, PaddedShape | None]:
        """The smallest bucket that holds such a step, and what to pad to; None: not padded."""
        if self.buckets is None:
            return None, None
        fitting = [
            b
            for b in self.buckets
            if b.num_tokens >= num_tokens
            and b.num_requests >= num_requests
            and b.num_blocks >= num_blocks
        ]
        if not fitting:
            raise ConfigError(
                f"no bucket of the backend holds a step of {num_tokens} tokens, {num_requests} "
                f"requests and {num_blocks} blocks a request; largest: {self.buckets[-1]}"
            )
        bucket = min(fitting, key=lambda b: (b.num_tokens, b.num_requests, b.num_blocks))
        # rows beyond one a request come from prompt logprobs: at most one a token
        rows = bucket.num_requests
        if num_rows > rows:
            rows = bucket.num_tokens + bucket.num_requests
        elif num_states and not num_rows:
            rows = 0  # nothing is drawn
        states = bucket.num_tokens if num_states else 0
        return bucket, PaddedShape(
            bucket.num_tokens, bucket.num_requests, bucket.num_blocks, rows, states
        )

    def step_for(self, inputs: StepInputs) -> StepFn:
        """The capture that runs `inputs`."""
        if self._enforce_eager:
            return self._step
        key = _key(inputs)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._backend.compile(self._step, inputs.meta.bucket, inputs)
            self._captured[key] = captured
        return captured

    def seal(self) -> None:
        """From now on a capture is an error (all that service needs must be captured before)."""
        self._sealed.enter_context(self._backend.seal())

    def unseal(self) -> None:
        """Allow captures again."""
        self._sealed.close()


def _key(inputs: StepInputs) -> CaptureKey:
    bucket, sample = inputs.meta.bucket, inputs.sample
    if bucket is None:  # sizes and kinds of sampling may vary: one capture serves all
        return CaptureKey(None, None, False, False, False, False, False, False, None, False, 0)
    return CaptureKey(
        bucket=bucket,
        num_rows=len(inputs.meta.logits_rows),
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
