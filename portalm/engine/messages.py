"""Messages between an engine and its client: plain data, msgpack on the wire, no pickle."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from portalm.config import Task
from portalm.core.plan import TokenLogprobs
from portalm.core.request import FinishReason
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm.structured.messages import LoadGrammar as LoadGrammar


class AddRequest(msgspec.Struct, tag=True, kw_only=True):
    """Add a request for one answer (a request with n > 1 is sent as n of these)."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    cache_salt: str = ""
    output_token_ids: list[int] = []
    """Tokens generated before: the answer continues after them."""
    fork_of: str | None = None
    """Id of an earlier request with the same prompt, whose KV blocks may be shared."""
    bad_words_ids: list[list[int]] = []
    """`params.bad_words` as token ids."""
    tenant: str = ""
    """Name of the tenant; tenants share the device fairly."""
    pooling: PoolingParams | None = None
    """How to pool the prompt's hidden states; None: generate."""
    second_text_start: int | None = None
    """Index of the first token of the second text of a pair, for models with token types."""
    grammar: str | None = None
    """Key of a grammar (see `LoadGrammar`) that the answer must match."""


class AbortRequests(msgspec.Struct, tag=True):
    """End these requests; ids that are not live are ignored."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Empty the prefix cache; ignored while any request runs."""


class Probe(msgspec.Struct, tag=True):
    """Check that the device responds; the engine replies with a `ProbeAnswer`."""

    timeout_s: float


class Shutdown(msgspec.Struct, tag=True):
    """Exit the engine process, dropping all requests."""


ToEngine: TypeAlias = AddRequest | LoadGrammar | AbortRequests | ResetPrefixCache | Probe | Shutdown


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a step changed about one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of prompt tokens, in order, from the second one; may be split over several outputs."""
    num_cached_tokens: int = 0
    pooled: bytes | None = None
    """float32: the vector, or the scores of a classifier, of a pooled request."""
    scheduled_time: float | None = None
    """When the request was first in a step; set in its first output, which may have no token. A
    value of time.monotonic(), which all processes of a machine share (Linux: CLOCK_MONOTONIC)."""
    error: str | None = None
    """Set where finish_reason is error."""
    is_refused: bool = False
    """The error is in the request itself: it can never be answered as asked."""


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's counters and gauges after a step; those named total only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    """Blocks in the pool, without the null block."""
    num_used_blocks: int = 0
    """Blocks held by running requests."""
    num_cached_blocks: int = 0
    """Blocks that no request holds, kept for a prefix hit."""
    kv_waste: float = 0.0
    """Share of held blocks in which no slot is used, 0 to 1."""
    prefix_queries_total: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits_total: int = 0
    """Prompt tokens found there."""
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    last_step_tokens: int = 0
    last_step_s: float = 0.0
    """Seconds of the last call of `Engine.step`, from planning to sampled ids."""

    @property
    def kv_used(self) -> float:
        """Share of the pool's blocks held by running requests, 0 to 1."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


class EngineReady(msgspec.Struct, tag=True, kw_only=True):
    """The engine has loaded its model and accepts requests."""

    model: str
    device: str
    """Name of the backend."""
    device_summary: str
    dtype: str
    vocab_size: int
    eos_token_ids: list[int]
    """Tokens that end an answer."""
    max_model_len: int
    num_blocks: int
    block_size: int
    tasks: tuple[Task, ...] = ("generate",)
    """Tasks that the model supports."""
    vector_size: int = 0
    """Size of a prompt's vector."""
    sampling_defaults: dict[str, int | float] = {}
    """Values of `SamplingParams` that requests have unless they set them, by name."""
    startup_s: dict[str, float]
    """Seconds by phase: load, budget, warm_up."""


class EngineProgress(msgspec.Struct, tag=True):
    """Progress of an engine that is starting."""

    phase: str
    """load, then capture (only if steps are captured before service), then warm_up."""
    share: float
    """Share of the phase that is done, 0 to 1."""


class EngineFailed(msgspec.Struct, tag=True):
    """The engine failed to start, or crashed; the message is for the user."""

    message: str


class StepOutputs(msgspec.Struct, tag=True):
    """All outputs of one step, in one message."""

    outputs: list[TokenOutput]
    stats: EngineStats


class ProbeAnswer(msgspec.Struct, tag=True):
    """The result of a `Probe`."""

    error: str | None = None
    """Why the device does not respond; None: it does."""


FromEngine: TypeAlias = EngineProgress | EngineReady | EngineFailed | StepOutputs | ProbeAnswer
