"""Body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams
from portalm.server.schemas.common import MAX_ANSWERS, MAX_PROMPT, Texts, TokenIds
from portalm.server.schemas.derived import NO_DEFAULTS
from portalm.server.schemas.sampling import SamplingFields


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[Texts, Field(max_length=MAX_ANSWERS)]
        | Annotated[TokenIds, Field(max_length=MAX_PROMPT)]
        | Annotated[
            list[Annotated[TokenIds, Field(max_length=MAX_PROMPT)]],
            Field(fail_fast=True, max_length=MAX_ANSWERS),
        ]
    )
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)

    @property
    def scores_only(self) -> bool:
        """Whether the reply is only the prompt with its logprobs: echo with max_tokens 0."""
        return self.echo and self.max_tokens == 0

    def params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Sampling parameters of each prompt, else from `defaults`. Raises `InvalidRequest`."""
        if self.suffix:
            raise InvalidRequest(
                "suffix is not supported: text is only generated after the prompt", param="suffix"
            )
        num_candidates = self._num_candidates()
        max_tokens = self.max_tokens
        if max_tokens is None:  # OpenAI's default, but no more than the model's
            max_tokens = min(16, defaults.get("max_tokens", 16))
        # best_of chooses by logprobs; an echoed prompt has logprobs if its answer has
        logprobs = 0 if self.logprobs is None and num_candidates > self.n else self.logprobs
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self.sampling_params(
            defaults,
            max_tokens=1 if self.scores_only else max_tokens,  # the engine samples at least one
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=num_candidates,
        )

    def _num_candidates(self) -> int:
        """Number of answers to generate, of which the n best are returned."""
        if self.best_of is None:
            return self.n
        if self.best_of < self.n:
            raise InvalidRequest(
                f"best_of ({self.best_of}) must be at least n ({self.n}): the n best of them are "
                f"returned",
                param="best_of",
            )
        if self.stream and self.best_of > self.n:
            raise InvalidRequest(
                "best_of above n cannot be streamed: the best answers are only known at the end",
                param="best_of",
            )
        return self.best_of

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whichever form was sent. Raises `InvalidRequest`."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        num_candidates = self._num_candidates()
        if len(self.prompt) * num_candidates > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(self.prompt)} prompts with {num_candidates} answers each are "
                f"{len(self.prompt) * num_candidates} answers; the limit is {MAX_ANSWERS}",
                param="prompt",
            )
        return list(self.prompt)
