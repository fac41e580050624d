"""Forks: requests that have the same prompt as another request and share its KV blocks."""

from __future__ import annotations

from collections.abc import Mapping

from portalm.core.plan import StepPlan
from portalm.core.request import Request


def fork_root(request: Request, live: Mapping[str, Request]) -> str | None:
    """Id of the request whose blocks `request` shares: its parent, or the parent's own root.

    None, for an ordinary request, if it has no live parent, needs prompt logprobs of its own, or
    differs from its parent in prompt, salt or priority (another prompt's blocks would give wrong
    answers).
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

    A later request that reuses the parent's id does not count. A fork does not wait for a parent
    that was preempted: it holds no blocks, or may lose them again.
    """
    if request.fork_of is None or request.num_output_tokens or request.num_preemptions:
        return None
    parent = live.get(request.fork_of)
    if parent is None or parent.arrival > request.arrival or parent.num_preemptions:
        return None
    return parent


def is_prompt_computed(parent: Request, plan: StepPlan) -> bool:
    """True if every token that a fork of `parent` shares is in the KV cache before `plan` runs.

    The plan's block copies run before anything that it computes. The caller excludes a parent that
    `plan` itself admits: it may have found cached blocks that `plan` computes.
    """
    num_computed = parent.num_computed_tokens
    for planned in plan.requests:
        if planned.request is parent:
            num_computed = planned.start
    return num_computed >= parent.num_prompt_tokens - 1


def blocks_to_fork(parent: Request, block_size: int) -> tuple[list[int], int, int | None]:
    """The parent's blocks of all prompt tokens except the last, from which a fork samples.

    Returns:
        Full blocks to share, the number of tokens computed, and the last block if it is not full:
        it must be copied, because both requests continue to write to it (copy-on-write).
    """
    num_computed = parent.num_prompt_tokens - 1
    num_full, rest = divmod(num_computed, block_size)
    return (
        parent.block_table[:num_full],
        num_computed,
        parent.block_table[num_full] if rest else None,
    )
