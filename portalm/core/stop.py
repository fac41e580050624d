"""When a sampled token ends its request."""

from __future__ import annotations

from portalm.core.request import FinishReason, Request


def finish_reason(request: Request) -> FinishReason | None:
    """The reason for which the last token ends `request`, or None. Sets `request.stop_reason`."""
    token_id = request.token_ids[-1]
    is_early = request.num_output_tokens <= request.params.min_tokens
    # before min_tokens a grammar allows one only where no other token is possible
    if token_id in request.stop_ids and (not is_early or request.grammar is not None):
        if token_id in request.params.stop_token_ids:
            request.stop_reason = token_id
        return "stop"
    if len(request.token_ids) >= request.max_total_tokens:
        return "length"
    return None
