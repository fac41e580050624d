"""What one step computes: the scheduler's word to the runner, and the runner's answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from portalm.core.request import FinishReason, Request


class PlannedRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    start: int
    """Tokens before this are in the KV cache; this step computes [start, start + num_tokens)."""
    num_tokens: int
    samples_token: bool
    """The step reaches the end of the known tokens, so it draws the next one."""
    epoch: int
    """The request's epoch when it was planned."""


@dataclass(slots=True)
class StepPlan:
    """One step: which requests compute how many tokens, after which block copies."""

    step_id: int
    requests: list[PlannedRequest] = field(default_factory=list)
    """Those with one token to compute first (decodes), then the others."""
    num_tokens: int = 0
    has_pooled: bool = False
    """Some request's hidden states are wanted."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) KV blocks to copy before the step (copy-on-write)."""
    preempted: list[Request] = field(default_factory=list)
    """Requests whose blocks were taken back while planning; they wait again."""
    admitted: list[Request] = field(default_factory=list)
    """Requests that begin to run for the first time."""
    released: list[str] = field(default_factory=list)
    """Ids that left the running set since the last plan (finished, aborted, preempted): the
    runner forgets their rows."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return not self.requests


@dataclass(slots=True)
class TokenLogprobs:
    """Logprobs at one position."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]
    """(token id, logprob) of the most likely tokens, most likely first."""


@dataclass(slots=True)
class StepResult:
    """What a step drew, in the order of the plan's requests."""

    token_ids: list[int]
    """For each planned request: the drawn token, or -1 where it draws none."""
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    """By request id, of the drawn token, for requests that asked."""
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    """By request id: of the prompt tokens that this step's rows predict."""
    pooled: dict[str, bytes] = field(default_factory=dict)
    """By request id, of those whose prompt is computed: float32 numbers, a vector or a score."""
    failed: dict[str, str] = field(default_factory=dict)
    """Requests whose own data broke the step (NaN logits), with the reason."""
    refused: dict[str, str] = field(default_factory=dict)
    """Requests that leave themselves no token to draw, with the reason: nothing is broken."""


@dataclass(slots=True)
class RequestUpdate:
    """News of one request after a step."""

    request: Request
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs_start: int = 0
    """How many prompt positions with logprobs come before the first of `prompt_logprobs`."""
    pooled: bytes | None = None
    """What its hidden states became, as float32, where it asked for that."""
    error: str | None = None
    """Why, where finish_reason is error."""
    is_refused: bool = False
    """The error is the request's own: it cannot be answered as asked."""
