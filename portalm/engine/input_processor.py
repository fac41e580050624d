"""From a caller's prompt and parameters to what an engine is asked; bad input stops here."""

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
"""Characters of a request id or a cache salt."""

_CHARS_OF_A_TOKEN = 16
"""Of texts with fewer characters for each token that fits it is not asked how long tokens are."""

MAX_PRIORITY = 2**31 - 1

NO_ANSWER = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
"""What stands for sampling parameters where a prompt is pooled and nothing is generated."""

_ENDPOINTS = {
    "generate": "it generates text: use /v1/completions or /v1/chat/completions",
    "embed": "it embeds text: use /v1/embeddings, /score or /rerank",
    "score": "it scores pairs of texts: use /score or /rerank",
}
_DOES = {"generate": "generate text", "embed": "embed text", "score": "score pairs of texts"}


@dataclass(frozen=True, slots=True)
class TextPair:
    """What a cross-encoder scores: a query and a document, say."""

    first: str
    second: str

    def __len__(self) -> int:
        """Characters of both."""
        return len(self.first) + len(self.second)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedInput:
    """A checked request."""

    request_id: str
    prompt: str | None
    """Text of the prompt; None if it was given as token ids, or truncated."""
    prompt_token_ids: list[int]
    requests: list[AddRequest]
    """One for each answer; the first is the one that the others fork from."""
    grammar: CompiledGrammar | None = None
    """What all answers match."""


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
        self._vector_size = ready.vector_size
        self._max_logprobs = max_logprobs
        self._seeds = random.Random(default_seed)
        self.tasks: Sequence[Task] = ready.tasks
        """What may be asked of the model."""
        self._longest_token: int | None = None
        """Characters of the longest token; counted when first needed."""

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
        """Check a request and convert it to what the engine takes.

        Args:
            request_id: id of the request.
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
            InvalidRequest: the request can never be answered; it says why.
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
        # stop strings are found on this side, grammars go by themselves
        sent = replace(params, n=1, stop=(), structured_outputs=None)
        fork = replace(sent, prompt_logprobs=None)  # the first answer reports the prompt's
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
        """Token ids of a prompt.

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
        """What to ask the engine for a prompt's vector, or for the score of a pair of texts.

        Raises:
            InvalidRequest: the request can never be answered; it says why.
        """
        self.check_task(params.task)
        if isinstance(prompt, TextPair) != (params.task == "score"):
            raise InvalidRequest("a score is of a pair of texts, and nothing else", param="prompt")
        _check_identity(request_id, cache_salt, priority)
        if params.dimensions is not None and params.dimensions > self._vector_size:
            raise InvalidRequest(
                f"dimensions ({params.dimensions}) is above the size of the model's vectors "
                f"({self._vector_size})",
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
        """Raise `InvalidRequest`, naming the right endpoint, if the model does not do `task`."""
        if task not in self.tasks:
            does = "; ".join(_ENDPOINTS[other] for other in self.tasks)
            raise InvalidRequest(f"this model does not {_DOES[task]}; {does}", param="model")

    def _truncated(self, token_ids: list[int], max_tokens: int | None) -> list[int]:
        if max_tokens is None:
            return token_ids
        most = self._max_model_len if max_tokens == -1 else max_tokens
        if self._tokenizer is None:
            return token_ids[:most]
        return self._tokenizer.truncate(token_ids, most)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, which may be longer than a prompt, but not many times as long.

        Raises:
            InvalidRequest: it is, or it is no valid Unicode.
        """
        tokenizer = self._need_tokenizer("a text prompt", "prompt")
        if len(text) > _CHARS_OF_A_TOKEN * self._max_model_len:
            if self._longest_token is None:
                tokens = map(tokenizer.id_to_token, range(tokenizer.vocab_size))
                self._longest_token = max(len(token or "") for token in tokens)
            most = max(_CHARS_OF_A_TOKEN, self._longest_token) * self._max_model_len
            if len(text) > most:  # to tokenise it would take long, and it cannot fit
                raise RequestTooLarge(
                    f"the text has {len(text)} characters; with a max_model_len of "
                    f"{self._max_model_len} no text of more than {most} can fit: shorten it",
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
                f"a prompt must be a text or a list of token ids, not {type(prompt).__name__}",
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
            why = ", so that at least one can be generated" if longest < self._max_model_len else ""
            raise RequestTooLarge(
                f"the prompt has {len(token_ids)} tokens; with a max_model_len of "
                f"{self._max_model_len} it may have {longest}{why}: shorten it, or raise "
                f"--max-model-len",
                param="prompt",
            )

    def _need_tokenizer(self, what: str, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(
                f"{what} needs a tokenizer and this engine has none: use token ids", param=param
            )
        return self._tokenizer

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and wanted > self._max_logprobs:
                raise InvalidRequest(
                    f"{name} ({wanted}) is above the engine's max_logprobs ({self._max_logprobs})",
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
                    f"{name} holds token id {token_id}, outside the vocabulary "
                    f"(0 to {self._vocab_size - 1})",
                    param=name,
                )

    def _bad_words_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it begins a text and as it follows a space."""
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
    """Raise `InvalidRequest` for an id, a salt or a priority that could not cross to the engine."""
    _check_request_id(request_id)
    _check_label("cache_salt", cache_salt, low=0)
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, not {priority}",
            param="priority",
        )


def _check_request_id(request_id: str) -> None:
    """Raise `InvalidRequest` for an id that would not be one word in a log line or a header."""
    _check_label("request_id", request_id, low=1)
    if not (request_id.isascii() and request_id.isprintable() and " " not in request_id):
        raise InvalidRequest(
            "request_id may have ASCII letters, digits and punctuation only, no spaces",
            param="request_id",
        )


def _check_label(name: str, label: str, *, low: int) -> None:
    """Raise `InvalidRequest` for a text that could not cross to the engine."""
    if not low <= len(label) <= MAX_LABEL:
        raise InvalidRequest(
            f"{name} must have {low} to {MAX_LABEL} characters, not {len(label)}", param=name
        )
    try:
        label.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{name} is not valid Unicode: it has half of a surrogate pair", param=name
        ) from None


def _as_int64(seed: int) -> int:
    """`seed` wrapped to 64 bits: the last answers of the largest seed go on with the smallest."""
    return (seed + 2**63) % 2**64 - 2**63
