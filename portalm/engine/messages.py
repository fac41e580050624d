"""What crosses between an engine and its clients: plain data, msgpack on the wire, no pickle."""

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
    """One answer to generate (a request with n > 1 is sent as n of these)."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    cache_salt: str = ""
    output_token_ids: list[int] = []
    """Generated before: the answer goes on behind them."""
    fork_of: str | None = None
    """Id of an earlier request with the same prompt, whose KV blocks may be shared."""
    bad_words_ids: list[list[int]] = []
    """`params.bad_words` as token ids."""
    tenant: str = ""
    """Whose it is; tenants share the device fairly."""
    pooling: PoolingParams | None = None
    """Nothing is generated: the prompt's hidden states are pooled."""
    second_text_start: int | None = None
    """Where the second text of a pair begins, for models that tell the two apart."""
    grammar: str | None = None
    """Key of a grammar (`LoadGrammar`) that the answer matches."""


class AbortRequests(msgspec.Struct, tag=True):
    """Stop these; ids that are not live are passed over."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Forget all cached blocks; refused, changing nothing, while any request runs."""


class Probe(msgspec.Struct, tag=True):
    """Ask the device for a sign of life; `ProbeAnswer` comes back."""

    timeout_s: float


class Shutdown(msgspec.Struct, tag=True):
    """End the engine process: abort what runs, then exit."""


ToEngine: TypeAlias = AddRequest | LoadGrammar | AbortRequests | ResetPrefixCache | Probe | Shutdown


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """News of one request after a step."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of prompt tokens, in order; the first prompt token has none. May come in parts."""
    num_cached_tokens: int = 0
    pooled: bytes | None = None
    """float32 numbers, of a request that is pooled: its vector, or its score."""
    scheduled_time: float | None = None
    """In the first output, which may bring no token: when the request was first in a step, by
    time.monotonic(), which all processes of a machine share (Linux: CLOCK_MONOTONIC)."""
    error: str | None = None
    """Why, where finish_reason is error."""
    is_refused: bool = False
    """The error is the request's own: it can never be answered as asked."""


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's counters after a step; those named total only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    """Blocks in the pool, the null block not counted."""
    num_used_blocks: int = 0
    """Held by running requests."""
    num_cached_blocks: int = 0
    """Held by nobody, kept for a prefix hit."""
    kv_waste: float = 0.0
    """Share of the slots in held blocks that no token uses, last partial blocks not counted."""
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
    """Seconds from planning a step to having its ids."""

    @property
    def kv_used(self) -> float:
        """Share of the pool's blocks that running requests hold, 0 to 1."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


class EngineReady(msgspec.Struct, tag=True, kw_only=True):
    """The engine has loaded its model and takes requests."""

    model: str
    device: str
    """Name of the backend."""
    device_summary: str
    dtype: str
    vocab_size: int
    eos_token_ids: list[int]
    """End an answer."""
    max_model_len: int
    num_blocks: int
    block_size: int
    tasks: tuple[Task, ...] = ("generate",)
    """What may be asked of the model."""
    vector_size: int = 0
    """Numbers of a prompt's vector."""
    startup_s: dict[str, float]
    """Seconds by phase: load, budget, warm_up."""


class EngineProgress(msgspec.Struct, tag=True):
    """How far an engine is that has not loaded its model yet."""

    phase: str
    """load, then capture (where all steps are captured before service), then warm_up."""
    share: float
    """Of the phase, 0 to 1."""


class EngineFailed(msgspec.Struct, tag=True):
    """The engine could not start, or ended; the text is for the user."""

    message: str


class StepOutputs(msgspec.Struct, tag=True):
    """All news of one step, in one message."""

    outputs: list[TokenOutput]
    stats: EngineStats


class ProbeAnswer(msgspec.Struct, tag=True):
    """The device answered, or why it did not."""

    error: str | None = None


FromEngine: TypeAlias = EngineProgress | EngineReady | EngineFailed | StepOutputs | ProbeAnswer
