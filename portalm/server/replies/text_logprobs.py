"""Logprobs as completions show them: OpenAI's older shape, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portalm.outputs import Logprob
from portalm.sampling_params import SamplingParams
from portalm.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TextLogprobs:
    """Logprobs of one text's tokens, and where in the text each begins.

    Offsets count the characters that the tokens before have completed: a character of several
    tokens begins where its first one does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        num_top: int,
        prompt_token_ids: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        """No token seen yet.

        Args:
            tokenizer: the model's.
            params: what the text leaves out of special tokens.
            num_top: most likely tokens to show at each place, beside the token itself.
            prompt_token_ids: what the text goes on from; empty: it begins here.
            offset: characters of the text before its first token.
        """
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._num_top = num_top
        self._offset = offset

    def of(self, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob] | None]) -> Any:
        """The next tokens as parallel lists; a token without an entry has null for logprobs."""
        offsets = [self._advance(token_id) for token_id in token_ids]
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [
                None if entry is None else _number(entry[token_id].logprob)
                for token_id, entry in zip(token_ids, entries, strict=True)
            ],
            "top_logprobs": [
                None if entry is None else self._top(token_id, entry)
                for token_id, entry in zip(token_ids, entries, strict=True)
            ],
            "text_offset": offsets,
        }

    def _advance(self, token_id: int) -> int:
        """Where the token begins; then its text counts."""
        begin = self._offset
        new = self._detokenizer.feed(token_id)
        self._offset += len(new)
        own = self._tokenizer.id_to_text(token_id)
        if len(new) > len(own) and new.endswith(own):
            return self._offset - len(own)  # what came before ends a broken character
        return begin

    def _top(self, token_id: int, entry: dict[int, Logprob]) -> dict[str, float]:
        """By name; of several tokens of one name the likeliest."""
        found: dict[str, float] = {}
        for other_id, one in entry.items():
            if other_id == token_id or one.rank <= self._num_top:
                name = self._name(other_id)
                found[name] = max(found.get(name, LEAST_LOGPROB), one.logprob)
        return found

    def _name(self, token_id: int) -> str:
        r"""The token's text; its bytes as OpenAI writes them (bytes:\xe2\x82) if it has none."""
        text = self._tokenizer.id_to_text(token_id)
        if "\ufffd" not in text:
            return text
        data = self._tokenizer.token_bytes(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs_object(
    entries: Sequence[dict[int, Logprob] | None] | None, num_top: int | None
) -> list[dict[str, Any] | None] | None:
    """For each prompt token null or {token id: {logprob, rank, decoded_token}}; None: not asked."""
    if entries is None or num_top is None:
        return None
    return [None if entry is None else _by_id(entry, num_top) for entry in entries]


def _by_id(entry: dict[int, Logprob], num_top: int) -> dict[str, Any]:
    own, *_ = entry
    return {
        str(token_id): {
            "logprob": _number(one.logprob),
            "rank": one.rank,
            "decoded_token": one.decoded_token,
        }
        for token_id, one in entry.items()
        if token_id == own or one.rank <= num_top
    }


def _number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
