"""Which tokens each row may sample: allowed_token_ids and grammars as bit masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from portalm.core.request import Request
from portalm.runner.sampled_rows import SampledRow
from portalm.structured.grammar import Grammar, Matcher, NoTokenFits


class TokenMasks:
    """Masks of a step's rows, and a grammar matcher for each running request.

    The state of a matcher follows from the request's tokens alone: a request that was preempted,
    requeued or resumed in another engine gets a new matcher, which reads all of them.
    """

    def __init__(self, vocab_size: int) -> None:
        """Create masks for logits with `vocab_size` columns."""
        self._full = _bits(range(vocab_size), -(-vocab_size // 32))
        self._matchers: dict[str, Matcher] = {}

    def forget(self, request_ids: list[str]) -> None:
        """Drop the matchers of requests that no longer run."""
        for request_id in request_ids:
            self._matchers.pop(request_id, None)

    def everything(self, num_rows: int) -> npt.NDArray[np.int32]:
        """int32 [num_rows, ceil(V / 32)]: a mask that allows every token."""
        return np.tile(self._full, (num_rows, 1))

    def build(self, rows: list[SampledRow], num_rows: int) -> npt.NDArray[np.int32] | None:
        """Build the mask, int32 [num_rows, ceil(V / 32)]; None if no row is restricted.

        Where a grammar may end it allows end of sequence. ignore_eos, min_tokens and
        allowed_token_ids forbid that as long as another token is possible; if none is, the answer
        ends. A row in which no token is allowed gets a `refusal`.
        """
        restricted = [
            i
            for i, row in enumerate(rows)
            if row.target < 0
            and (row.request.grammar is not None or row.request.params.allowed_token_ids)
        ]
        if not restricted:
            return None
        mask = np.full((num_rows, len(self._full)), -1, np.int32)
        for i in restricted:
            row = rows[i]
            try:
                self._restrict(row, mask, i)
            except NoTokenFits as error:
                row.refusal = f"structured_outputs: {error}"
                mask[i] = 0
                self._matchers.pop(row.request.request_id, None)
        return mask

    def _restrict(self, row: SampledRow, mask: npt.NDArray[np.int32], i: int) -> None:
        request, params, words = row.request, row.request.params, mask[i]
        end: Sequence[int] = ()
        forbidden = row.forbidden_ids
        if request.grammar is not None:
            assert isinstance(request.grammar, Grammar)
            self._matcher(request, request.grammar).fill(mask, i)
            eos = request.grammar.eos_token_ids
            end = eos if _has(words, eos[0]) else ()
            forbidden = [*forbidden, *(eos if params.ignore_eos else ())]
        words &= self._full
        if params.allowed_token_ids is not None:
            words &= _bits(params.allowed_token_ids, len(words))
        if forbidden:
            words &= ~_bits(forbidden, len(words))
        if not words.any():
            words |= _bits(end, len(words))
            if not end:
                row.refusal = (
                    f"no token is left to sample at position "
                    f"{row.position - request.num_prompt_tokens} of the answer: "
                    "structured_outputs, allowed_token_ids, bad_words and min_tokens together "
                    "forbid every token"
                )

    def _matcher(self, request: Request, grammar: Grammar) -> Matcher:
        matcher = self._matchers.get(request.request_id)
        if matcher is None:
            matcher = self._matchers[request.request_id] = grammar.matcher()
        matcher.advance(request.token_ids, request.num_prompt_tokens)
        return matcher


def _bits(token_ids: Sequence[int], num_words: int) -> npt.NDArray[np.int32]:
    """int32 [num_words] with the bits of `token_ids` set."""
    words = np.zeros(num_words, np.uint32)
    ids = np.array(token_ids, np.uint32)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32))
    return words.view(np.int32)


def _has(words: npt.NDArray[np.int32], token_id: int) -> bool:
    """True if the bit of `token_id` is set."""
    return bool(words.view(np.uint32)[token_id // 32] >> (token_id % 32) & 1)
