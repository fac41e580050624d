"""What one step computes (scheduler to runner), and what it produced (runner to scheduler)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from portalm.core.request import FinishReason, Request

# -- the plan ---------------------------------------------------------------------------------


class PlannedRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    start: int
    """Tokens before this are in the KV cache; this step computes [start, start + num_tokens)."""
    num_tokens: int
    samples_token: bool
    """The step computes the last known token, so it samples the next one."""
    epoch: int
    """The request's epoch when it was planned."""

    @property
    def num_prompt_rows(self) -> int:
        """Tokens of this step that predict a prompt token whose logprob was requested."""
        request = self.request
        if request.params.prompt_logprobs is None:
            return 0
        end = min(self.start + self.num_tokens, request.num_prompt_tokens - 1)
        return max(0, end - self.start)  # the last prompt token predicts a token of the answer


@dataclass(slots=True)
class StepPlan:
    """One step: the block copies it begins with, and how many tokens each request computes."""

    step_id: int
    requests: list[PlannedRequest] = field(default_factory=list)
    """Requests with one token to compute (decodes) first, then the others."""
    num_tokens: int = 0
    has_pooled: bool = False
    """True if any request is pooled."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) KV blocks to copy before the step (copy-on-write)."""
    preempted: list[Request] = field(default_factory=list)
    """Requests that lost their blocks during planning and are back in the queue."""
    admitted: list[Request] = field(default_factory=list)
    """Requests that run for the first time."""
    released: list[str] = field(default_factory=list)
    """Ids of requests that stopped running since the last plan (finished, aborted, preempted):
    the runner frees their rows."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute."""
        return not self.requests


# -- the result -------------------------------------------------------------------------------


@dataclass(slots=True)
class TokenLogprobs:
    """Logprobs at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top: list[tuple[int, float]]
    """(token id, logprob) of the most likely tokens, most likely first."""


@dataclass(slots=True)
class Sampled:
    """The tokens that a request sampled, in order; at least one."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `token_ids`; None if the request does not ask for logprobs."""


@dataclass(slots=True)
class Pooled:
    """The pooled output of a request whose prompt is computed."""

    values: bytes
    """float32: a vector, or the scores of a classifier."""


@dataclass(slots=True)
class Failed:
    """The model or a logits processor failed on this request; its KV blocks may be broken too."""

    reason: str


@dataclass(slots=True)
class Refused:
    """The request's own parameters leave no token to sample."""

    reason: str


Outcome: TypeAlias = Sampled | Pooled | Failed | Refused
"""What a step produced for one request."""


@dataclass(slots=True)
class StepResult:
    """What a step produced."""

    outcomes: list[Outcome | None]
    """For each planned request; None where the step computed a part of a prompt."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index in the plan: logprobs of the prompt tokens that the step predicted, in order. Apart
    from the outcomes, because every part of a prompt may have some."""


@dataclass(slots=True)
class RequestUpdate:
    """What a step changed about one request."""

    request: Request
    outcome: Outcome | None
    """None if the step only computed prompt logprobs. Without tokens sampled after the end."""
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs_start: int = 0
    """Index of the first entry of `prompt_logprobs` among all of the prompt's."""
