"""What a caller gets back: names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from portalm.core.request import FinishReason


@dataclass(slots=True)
class Logprob:
    """A token's log probability at one position."""

    logprob: float
    rank: int
    """1 is the most likely token."""
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds since the epoch; None: not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """By position: token id -> Logprob, the drawn token first."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    lora_request: None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    pooled: bytes | None = None
    """float32 numbers, where the prompt was pooled: its vector, or its score."""
    error: str | None = None
    """Why an answer has finish_reason "error"."""


@dataclass(slots=True)
class EmbeddingOutput:
    """A vector."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """A pair of texts and its score."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
