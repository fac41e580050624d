"""Results returned to the caller, with the names of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from portalm.core.request import FinishReason


@dataclass(slots=True)
class Logprob:
    """A token's log probability at one position."""

    logprob: float
    rank: int
    """Rank of the token by probability; 1 is the most likely."""
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds since the epoch; None: has not happened yet.

    Measured with a monotonic clock: differences are right even if the system clock is changed.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    """When one of its answers was first scheduled in a step."""
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
    """Per position: token id -> Logprob, with the sampled token first."""
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
    """For a pooling request: its vector or score, as float32 bytes."""
    error: str | None = None
    """Error message of an answer with finish_reason "error"."""


@dataclass(slots=True)
class BeamSearchSequence:
    """A continuation found by beam search."""

    tokens: list[int]
    """Token ids of the prompt and the continuation."""
    text: str
    """Text of the continuation."""
    cum_logprob: float
    """Sum of the log probabilities of the continuation's tokens."""
    score: float
    """`cum_logprob` divided by the length to the power of length_penalty; higher is better."""
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """A prompt's most likely continuations, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class EmbeddingOutput:
    """An embedding vector."""

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
    """Score of a pair of texts."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """A pair of texts and its score."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
