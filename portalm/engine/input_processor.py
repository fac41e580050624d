"""Check a caller's prompt and parameters, and turn them into the engine's requests."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from portalm.config import Task
from portalm.engine.messages import AddRequest, EngineReady
from portalm.errors import InvalidRequest, RequestTooLarge
from portalm.logits_processor import check_logits_processors
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams, as_token_ids
from portalm.structured.messages import CompiledGrammar
from portalm.text.tokenizer import Tokenizer

MAX_LABEL = 256
"""Maximum characters of a request id or a cache salt."""

_CHARS_OF_A_TOKEN = 16
"""A text of up to this many characters per token of context skips the longest-token check."""

MAX_PRIORITY = 2**31 - 1

NO_ANSWER = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
"""Placeholder sampling parameters of pooling requests, which generate nothing."""

_ENDPOINTS = {
    "generate": "it generates text: use /v1/completions or /v1/chat/completions",
    "embed": "it embeds text: use /v1/embeddings, /score or /rerank",
    "score": "it scores pairs of texts: use /score or /rerank",
}
_TASKS = {"generate": "generate text", "embed": "embed text", "score": "score pairs of texts"}


@dataclass(frozen=True, slots=True)
class TextPair:
    """A pair of texts for a cross-encoder to score, such as a query and a document."""

    first: str
    second: str

    def __len__(self) -> int:
        """Characters of both texts."""
        return len(self.first) + len(self.second)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedInput:
    """A checked request, ready for the engine."""

    request_id: str
    prompt: str | None
    """Text of the prompt; None if it was given as token ids, or truncated."""
    prompt_token_ids: list[int]
    requests: list[AddRequest]
    """One per answer; the others fork from the first."""
    grammar: CompiledGrammar | None = None
    """Grammar that all answers match; None: no constraint."""


class InputProcessor:
    """Tokenizes and checks requests for one engine."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        ready: EngineReady,
        *,
        max_logprobs: int,
        default_seed: int,
    ) -> None:
        """Set up for one engine.

        Args:
            tokenizer: None: prompts must be token ids.
            ready: what the engine reported when it had loaded.
            max_logprobs: maximum of a request's logprobs and prompt_logprobs.
            default_seed: seed of the seeds for requests that have none, so that a script that runs
                twice gives the same answers.
        """
        self._tokenizer = tokenizer
        self._vocab_size = ready.vocab_size
        self._max_model_len = ready.max_model_len
        self._vector_size = ready.vector_size
        self._max_logprobs = max_logprobs
        self._seeds = random.Random(default_seed)
        self.tasks: Sequence[Task] = ready.tasks
        """Tasks that the model supports."""
        self._longest_token: int | None = None
        """Characters of the longest token; computed when first needed."""

    def process(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        grammar: CompiledGrammar | None = None,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> ProcessedInput:
        """Check a request to generate text and convert it to messages for the engine.

        Args:
            request_id: unique among open requests.
            prompt: text or token ids.
            params: sampling parameters.
            priority: lower runs first, if the scheduling policy is "priority".
            cache_salt: cached blocks are shared only between requests with the same salt.
            tenant: name of the tenant that the request belongs to.
            grammar: `params.structured_outputs`, compiled.
            add_special_tokens: add the model's special tokens (BOS, for example) to a text.
            truncate_prompt_tokens: keep only this many of the prompt's last tokens; -1: as many
                as leave room for the answer.

        Raises:
            InvalidRequest: the request can never be answered.
        """
        assert (grammar is None) == (params.structured_outputs is None)
        self.check_task("generate")
        _check_identity(request_id, cache_salt, priority)
        max_prompt = truncate_prompt_tokens
        if max_prompt is not None and max_prompt < 0:
            max_prompt = max(1, self._max_model_len - (params.max_tokens or 1))
        token_ids = self.check_prompt(
            prompt, add_special_tokens=add_special_tokens, keep_last=max_prompt
        )
        self._check_params(params)
        bad_words_ids = self._bad_words_ids(params.bad_words)
        # the engine searches no stop strings, and gets grammars in separate messages
        sent = replace(params, n=1, stop=(), structured_outputs=None)
        fork = replace(sent, prompt_logprobs=None)  # only the first answer reports them
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        ids = [request_id if params.n == 1 else f"{request_id}-{i}" for i in range(params.n)]
        requests = [
            AddRequest(
                request_id=ids[i],
                prompt_token_ids=token_ids,
                params=sent if i == 0 else fork,
                seed=_as_int64(seed + i),
                priority=priority,
                cache_salt=cache_salt,
                fork_of=None if i == 0 else ids[0],
                bad_words_ids=bad_words_ids,
                tenant=tenant,
                grammar=None if grammar is None else grammar.key,
            )
            for i in range(params.n)
        ]
        return ProcessedInput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) and max_prompt is None else None,
            prompt_token_ids=token_ids,
            requests=requests,
            grammar=grammar,
        )

    def check_prompt(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        keep_last: int | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: text or token ids.
            add_special_tokens: add the model's special tokens (BOS, for example) to a text.
            keep_last: cut the prompt to this many of its last tokens; None: do not cut it.

        Raises:
            InvalidRequest: the prompt is malformed, or leaves no room for an answer.
        """
        token_ids = self._token_ids(
            prompt, add_special_tokens=add_special_tokens, keep_last=keep_last
        )
        self._check_length(token_ids, self._max_model_len - 1)
        return token_ids

    def process_pooling(
        self,
        request_id: str,
        prompt: str | Sequence[int] | TextPair,
        params: PoolingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
    ) -> ProcessedInput:
        """Check a request for a vector or a score and convert it to a message for the engine.

        Raises:
            InvalidRequest: the request can never be answered.
        """
        self.check_task(params.task)
        if isinstance(prompt, TextPair) != (params.task == "score"):
            raise InvalidRequest(
                'task "score" needs a pair of texts; other tasks take one text', param="prompt"
            )
        _check_identity(request_id, cache_salt, priority)
        if params.dimensions is not None and params.dimensions > self._vector_size:
            raise InvalidRequest(
                f"dimensions ({params.dimensions}) is above the size of the model's vectors "
                f"({self._vector_size}): reduce it",
                param="dimensions",
            )
        second_text_start = None
        if isinstance(prompt, TextPair):
            tokenizer = self._need_tokenizer("a pair of texts", "prompt")
            token_ids, second_text_start = tokenizer.encode_pair(prompt.first, prompt.second)
        else:
            token_ids = self._token_ids(prompt, add_special_tokens=True)
        token_ids = self._truncated(token_ids, params.truncate_prompt_tokens)
        self._check_length(token_ids, self._max_model_len)
        request = AddRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=NO_ANSWER,
            seed=0,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            pooling=replace(params, truncate_prompt_tokens=None),  # done
            second_text_start=second_text_start,
        )
        return ProcessedInput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            requests=[request],
        )

    def check_task(self, task: Task) -> None:
        """Raise `InvalidRequest` if the model does not support `task`."""
        if task not in self.tasks:
            supported = "; ".join(_ENDPOINTS[other] for other in self.tasks)
            raise InvalidRequest(f"this model does not {_TASKS[task]}; {supported}", param="model")

    def _truncated(self, token_ids: list[int], max_tokens: int | None) -> list[int]:
        if max_tokens is None:
            return token_ids
        most = self._max_model_len if max_tokens == -1 else max_tokens
        if self._tokenizer is None:
            return token_ids[:most]
        return self._tokenizer.truncate(token_ids, most)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, which may be somewhat longer than a prompt.

        Raises:
            InvalidRequest: the text cannot fit the model, or is not valid Unicode.
        """
        tokenizer = self._need_tokenizer("a text prompt", "prompt")
        if len(text) > _CHARS_OF_A_TOKEN * self._max_model_len:
            if self._longest_token is None:
                tokens = map(tokenizer.id_to_token, range(tokenizer.vocab_size))
                self._longest_token = max(len(token or "") for token in tokens)
            most = max(_CHARS_OF_A_TOKEN, self._longest_token) * self._max_model_len
            if len(text) > most:  # it cannot fit, and tokenizing it would take long
                raise RequestTooLarge(
                    f"the text has {len(text)} characters; with max_model_len "
                    f"{self._max_model_len} at most {most} can fit: shorten it",
                    param="prompt",
                )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _token_ids(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool,
        keep_last: int | None = None,
    ) -> list[int]:
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequest(
                f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}",
                param="prompt",
            )
        if isinstance(prompt, str):
            token_ids = self.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = as_token_ids(prompt)
        if keep_last is not None:
            token_ids = token_ids[max(0, len(token_ids) - keep_last) :]
        if not token_ids:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        self._check_ids("prompt", token_ids)
        return token_ids

    def _check_length(self, token_ids: Sequence[int], longest: int) -> None:
        if len(token_ids) > longest:
            why = ", which leaves room for one more" if longest < self._max_model_len else ""
            raise RequestTooLarge(
                f"the prompt has {len(token_ids)} tokens; with max_model_len {self._max_model_len} "
                f"it may have at most {longest}{why}: shorten it, or raise --max-model-len",
                param="prompt",
            )

    def _need_tokenizer(self, what: str, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(
                f"{what} needs a tokenizer, and this engine has none: pass token ids", param=param
            )
        return self._tokenizer

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and wanted > self._max_logprobs:
                raise InvalidRequest(
                    f"{name} ({wanted}) is above the engine's max_logprobs ({self._max_logprobs}): "
                    f"reduce it, or raise --max-logprobs",
                    param=name,
                )
        if params.stop:
            self._need_tokenizer("stop", "stop")
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        check_logits_processors(params.logits_processors)

    def _check_ids(self, name: str, token_ids: Collection[int]) -> None:
        if not token_ids:
            return
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"{name} contains token id {token_id}, outside the vocabulary "
                    f"(0 to {self._vocab_size - 1})",
                    param=name,
                )

    def _bad_words_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of each word at the beginning of a text and after a space."""
        found: list[list[int]] = []
        for word in words:
            tokenizer = self._need_tokenizer("bad_words", "bad_words")
            for text in (word, " " + word.lstrip()):
                ids = tokenizer.encode(text, add_special_tokens=False)
                self._check_ids("bad_words", ids)
                if ids and ids not in found:
                    found.append(ids)
        return found


def _check_identity(request_id: str, cache_salt: str, priority: int) -> None:
    """Raise `InvalidRequest` for an id, salt or priority that cannot be sent to the engine."""
    _check_request_id(request_id)
    _check_label("cache_salt", cache_salt, low=0)
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, not {priority}",
            param="priority",
        )


def _check_request_id(request_id: str) -> None:
    """Raise `InvalidRequest` for an id that is not a single word in a log line or a header."""
    _check_label("request_id", request_id, low=1)
    if not (request_id.isascii() and request_id.isprintable() and " " not in request_id):
        raise InvalidRequest(
            "request_id may contain only ASCII letters, digits and punctuation, no spaces",
            param="request_id",
        )


def _check_label(name: str, label: str, *, low: int) -> None:
    """Raise `InvalidRequest` for a text that is too long or not valid Unicode."""
    if not low <= len(label) <= MAX_LABEL:
        raise InvalidRequest(
            f"{name} must have {low} to {MAX_LABEL} characters, not {len(label)}", param=name
        )
    try:
        label.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{name} is not valid Unicode: it contains a lone surrogate", param=name
        ) from None


def _as_int64(seed: int) -> int:
    """Wrap a seed to a signed 64-bit integer: after the largest comes the smallest."""
    return (seed + 2**63) % 2**64 - 2**63
