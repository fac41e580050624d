"""A request in the core: its known tokens, computed tokens and KV blocks."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestStatus(enum.Enum):
    """State of a request. It holds blocks only while running."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One prompt being answered.

    Only the scheduler writes its fields. When steps are planned asynchronously,
    `num_computed_tokens` is ahead of the device: it counts tokens that a planned step will have
    put into the KV cache. `num_placeholders` counts sampled tokens whose ids are still on the
    device.
    """

    __slots__ = (
        "arrival",
        "bad_words_ids",
        "block_hashes",
        "block_table",
        "cache_salt",
        "epoch",
        "finish_reason",
        "fork_of",
        "grammar",
        "max_total_tokens",
        "needs_history",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "params",
        "pooling",
        "priority",
        "request_id",
        "second_text_start",
        "seed",
        "status",
        "stop_ids",
        "stop_reason",
        "tenant",
        "token_ids",
        "turn",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        max_total_tokens: int,
        eos_token_ids: Sequence[int] = (),
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
        fork_of: str | None = None,
        bad_words_ids: Sequence[Sequence[int]] = (),
        tenant: str = "",
        pooling: PoolingParams | None = None,
        second_text_start: int | None = None,
        grammar: object | None = None,
    ) -> None:
        """Create a waiting request.

        Args:
            request_id: unique among live requests.
            prompt_token_ids: at least one.
            params: already validated; `n` is ignored (each answer is its own request).
            seed: seed of the noise; the same seed gives the same tokens.
            max_total_tokens: maximum of prompt plus answer, from max_tokens and max_model_len.
            eos_token_ids: end the answer, unless `params.ignore_eos`. With a grammar they always
                do: its mask allows them only if ignore_eos is off or no other token is possible.
            priority: lower runs first, under the priority policy.
            cache_salt: only requests with equal salts share prefix cache blocks.
            output_token_ids: tokens generated before, for a request that is resumed.
            fork_of: id of a request with the same prompt, whose KV blocks may be shared.
            bad_words_ids: the last token of each may not be sampled after the tokens before it.
            tenant: name of the tenant; tenants share the device fairly.
            pooling: how to pool its hidden states, with every option resolved. The request samples
                no token and finishes after prefill.
            second_text_start: index of the first token of the second text of a pair.
            grammar: grammar that the answer matches; opaque to the core.
        """
        self.request_id = request_id
        self.token_ids: list[int] = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.seed = seed
        self.max_total_tokens = max_total_tokens
        self.stop_ids = frozenset(params.stop_token_ids).union(
            () if params.ignore_eos and grammar is None else eos_token_ids
        )
        self.priority = priority
        self.cache_salt = cache_salt
        self.fork_of = fork_of
        self.bad_words_ids = bad_words_ids
        self.tenant = tenant
        self.pooling = pooling
        self.second_text_start = second_text_start
        self.grammar = grammar
        self.needs_history = params.needs_history or grammar is not None
        """True if sampling a token needs the previous token on the host."""
        self.arrival = 0
        """Number in the order of arrival; set by the scheduler."""
        self.turn: int | None = None
        """Number in the order in which requests first ran; None if it has not run yet."""
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_placeholders = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        """Digest of each full block of known tokens; computed when needed."""
        self.num_published_blocks = 0
        """Number of leading blocks already published to the prefix cache."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache when it was first admitted."""
        self.num_preemptions = 0
        self.epoch = 0
        """Incremented when the request is preempted: outcomes of earlier plans are dropped."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        """The stop token id that ended it; None for end of sequence."""

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host: prompt and answer so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known, or sampled and still on the device, but not yet in the KV cache."""
        return len(self.token_ids) + self.num_placeholders - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens (a copy)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """True once it has ended, for any reason."""
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, blocks={len(self.block_table)})"
        )
