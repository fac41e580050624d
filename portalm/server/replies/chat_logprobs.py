"""The `logprobs` field of chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portalm.outputs import Logprob
from portalm.server.replies.text_logprobs import LEAST_LOGPROB
from portalm.text.tokenizer import Tokenizer


def chat_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[dict[int, Logprob]] | None,
    num_top: int,
) -> dict[str, Any] | None:
    """OpenAI's `logprobs` object of a message; None if it was not requested.

    Args:
        tokenizer: the model's tokenizer; `bytes` are a token's own, even if it is part of a
            character.
        token_ids: the sampled tokens.
        entries: for each of them, logprobs of the sampled and of the most likely tokens.
        num_top: number of most likely tokens to show.
    """
    if entries is None:
        return None

    def shown(token_id: int, one: Logprob) -> dict[str, Any]:
        return {
            "token": one.decoded_token or "",
            "logprob": max(one.logprob, LEAST_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        likely = sorted(entry.items(), key=lambda item: item[1].rank)
        top = [shown(other, one) for other, one in likely if one.rank <= num_top]
        content.append({**shown(token_id, entry[token_id]), "top_logprobs": top})
    return {"content": content}
