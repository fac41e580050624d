"""Logprobs of completions in OpenAI's older format, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portalm.outputs import Logprob
from portalm.sampling_params import SamplingParams
from portalm.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot express."""


class TextLogprobs:
    """Formats the logprobs of one text's tokens, with each token's offset in the text.

    An offset counts the characters that the earlier tokens complete: all tokens of one character
    have the offset of that character.
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
        """Start before the first token.

        Args:
            tokenizer: the model's tokenizer.
            params: whether special tokens appear in the text.
            num_top: number of most likely tokens to show at each position, in addition to the
                token itself.
            prompt_token_ids: tokens that the text continues; empty: it starts a text.
            offset: offset of the first token.
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
        """Format the next tokens as parallel lists; a token without an entry has null logprobs."""
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
        """Advance past a token and return its offset."""
        begin = self._offset
        new = self._detokenizer.feed(token_id)
        self._offset += len(new)
        own = self._tokenizer.id_to_text(token_id)
        if len(new) > len(own) and new.endswith(own):
            return self._offset - len(own)  # `new` starts with the rest of an invalid character
        return begin

    def _top(self, token_id: int, entry: dict[int, Logprob]) -> dict[str, float]:
        """Logprobs by token name; of several tokens with one name, the highest."""
        found: dict[str, float] = {}
        for other_id, one in entry.items():
            if other_id == token_id or one.rank <= self._num_top:
                name = self._name(other_id)
                found[name] = max(found.get(name, LEAST_LOGPROB), one.logprob)
        return found

    def _name(self, token_id: int) -> str:
        r"""The token's text; for part of a character, its bytes as in OpenAI's API (bytes:\xe2)."""
        text = self._tokenizer.id_to_text(token_id)
        if "\ufffd" not in text:
            return text
        data = self._tokenizer.token_bytes(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs_object(
    entries: Sequence[dict[int, Logprob] | None] | None, num_top: int | None
) -> list[dict[str, Any] | None] | None:
    """For each prompt token null or {token id: {logprob, rank, decoded_token}}.

    None if prompt logprobs were not requested.
    """
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
