"""Forks: requests with the prompt of another one, whose KV blocks they share."""

from __future__ import annotations

from collections.abc import Mapping

from portalm.core.plan import StepPlan
from portalm.core.request import Request


def fork_root(request: Request, live: Mapping[str, Request]) -> str | None:
    """Id of the request whose blocks `request` shares: its parent, or what that is a fork of.

    None makes it an ordinary request: it has no live parent, it needs its own prompt logprobs,
    or what it says of its parent is not so (and would give it another's context).
    """
    parent = None if request.fork_of is None else live.get(request.fork_of)
    if (
        parent is None
        or parent.token_ids[: parent.num_prompt_tokens] != request.token_ids
        or parent.cache_salt != request.cache_salt
        or parent.priority != request.priority
        or request.params.prompt_logprobs is not None
    ):
        return None
    return parent.request_id if parent.fork_of is None else parent.fork_of


def fork_parent(request: Request, live: Mapping[str, Request]) -> Request | None:
    """The request whose blocks `request` may share, now or once they are computed.

    One that came later under the same id is not it. One that was preempted is not waited for:
    it holds no blocks, or may not for long.
    """
    if request.fork_of is None or request.num_output_tokens or request.num_preemptions:
        return None
    parent = live.get(request.fork_of)
    if parent is None or parent.arrival > request.arrival or parent.num_preemptions:
        return None
    return parent


def is_prompt_computed(parent: Request, plan: StepPlan) -> bool:
    """True if all that a fork of `parent` shares is in the KV cache before `plan` runs.

    The plan's copies come first. `parent` ran before: one that this plan admits may have found
    blocks that this plan computes.
    """
    num_computed = parent.num_computed_tokens
    for planned in plan.requests:
        if planned.request is parent:
            num_computed = planned.start
    return num_computed >= parent.num_prompt_tokens - 1


def blocks_to_fork(parent: Request, block_size: int) -> tuple[list[int], int, int | None]:
    """The parent's blocks of all prompt tokens but the last, which draws a fork's first token.

    Returns:
        Full blocks to share, the tokens computed, and the block to copy, if the last of them is
        not full: both requests go on writing to it (copy-on-write; a fork writes at once).
    """
    num_computed = parent.num_prompt_tokens - 1
    num_full, rest = divmod(num_computed, block_size)
    return (
        parent.block_table[:num_full],
        num_computed,
        parent.block_table[num_full] if rest else None,
    )
