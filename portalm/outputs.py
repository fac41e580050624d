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
    """Times of one request, in seconds since the epoch; None: not yet.

    Taken from a clock that is never set back: differences are right whatever happens to the date.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    """When the first of its answers was first in a step of the engine."""
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def queue_s(self) -> float | None:
        """Seconds from arrival to the first step."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the first step to the first token."""
        return _between(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_s(self) -> float | None:
        """Seconds from the first token to the end."""
        return _between(self.first_token_time, self.finished_time)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def e2e_s(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


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
class BeamSearchSequence:
    """One of the likeliest continuations."""

    tokens: list[int]
    """The prompt's, then the continuation's."""
    text: str
    """Of the continuation."""
    cum_logprob: float
    """Of the continuation's tokens together."""
    score: float
    """By which it is ranked: `cum_logprob` over its length to the power of length_penalty."""
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """A prompt's likeliest continuations, the best first."""

    sequences: list[BeamSearchSequence]


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
