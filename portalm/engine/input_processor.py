"""From a caller's prompt and parameters to what an engine is asked; bad input stops here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from portalm.engine.messages import AddRequest, EngineReady
from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams, as_token_ids
from portalm.text.tokenizer import Tokenizer

MAX_REQUEST_ID = 256
"""Characters of a request id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedInput:
    """A checked request."""

    request_id: str
    prompt: str | None
    """The text, where the caller gave one."""
    prompt_token_ids: list[int]
    requests: list[AddRequest]
    """One for each answer; the first is the one that the others fork from."""


class InputProcessor:
    """Tokenises and checks requests for one engine."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        ready: EngineReady,
        *,
        max_logprobs: int,
        default_seed: int,
    ) -> None:
        """For the engine that said `ready`; without a tokenizer prompts must be token ids.

        Seeds that callers leave out are drawn from `default_seed`, so that a script that runs
        twice answers the same twice.
        """
        self._tokenizer = tokenizer
        self._vocab_size = ready.vocab_size
        self._max_model_len = ready.max_model_len
        self._max_logprobs = max_logprobs
        self._seeds = random.Random(default_seed)

    def process(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ProcessedInput:
        """What to ask the engine.

        Raises:
            InvalidRequest: the request can never be answered; it says why.
        """
        if not request_id or len(request_id) > MAX_REQUEST_ID:
            raise InvalidRequest(
                f"request_id must have 1 to {MAX_REQUEST_ID} characters, not {len(request_id)}",
                param="request_id",
            )
        token_ids = self._token_ids(prompt)
        self._check_params(params)
        sent = replace(params, n=1, stop=(), detokenize=False, bad_words=())
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        first_id = request_id if params.n == 1 else f"{request_id}-0"
        requests = [
            AddRequest(
                request_id=first_id if i == 0 else f"{request_id}-{i}",
                prompt_token_ids=token_ids,
                params=sent,
                seed=seed + i,
                priority=priority,
                cache_salt=cache_salt,
                fork_of=None if i == 0 else first_id,
                bad_words_ids=self._bad_words_ids(params.bad_words),
            )
            for i in range(params.n)
        ]
        return ProcessedInput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            requests=requests,
        )

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequest(
                    "there is no tokenizer: give the prompt as token ids", param="prompt"
                )
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = as_token_ids(prompt)
            self._check_ids("prompt", token_ids)
        if not token_ids:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        if len(token_ids) >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens; with max_model_len="
                f"{self._max_model_len} it may have {self._max_model_len - 1}, so that at least "
                f"one can be generated: shorten it, or serve with a larger --max-model-len",
                param="prompt",
            )
        return token_ids

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and wanted > self._max_logprobs:
                raise InvalidRequest(
                    f"{name} ({wanted}) is above the engine's max_logprobs ({self._max_logprobs})",
                    param=name,
                )
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop needs a tokenizer: use stop_token_ids", param="stop")
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"{name} holds token id {token_id}, outside the vocabulary "
                    f"(0 to {self._vocab_size - 1})",
                    param=name,
                )

    def _bad_words_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it begins a text and as it follows a space."""
        if words and self._tokenizer is None:
            raise InvalidRequest("bad_words needs a tokenizer", param="bad_words")
        found: list[list[int]] = []
        for word in words:
            for text in (word, " " + word.lstrip()):
                assert self._tokenizer is not None
                ids = self._tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found
