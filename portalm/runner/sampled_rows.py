"""What each row of a step's logits is for."""

from __future__ import annotations

from dataclasses import dataclass

from portalm.core.plan import StepPlan
from portalm.core.request import Request


@dataclass(slots=True)
class SampledRow:
    """The purpose of one row of logits."""

    index: int
    """Index in the plan."""
    request: Request
    position: int
    """Position of the sampled (or predicted) token in its request."""
    target: int
    """The prompt token whose logprob is requested, or -1 to sample a token."""
    refusal: str | None = None
    """Why no token can be sampled: the request's own parameters forbid all. None: one can be."""
    fault: str | None = None
    """Why the sampled token must be dropped: a logits processor failed. None: none did."""

    @property
    def forbidden_ids(self) -> list[int]:
        """Stop tokens before min_tokens, and tokens that would complete a bad word."""
        request = self.request
        is_early = self.position - request.num_prompt_tokens < request.params.min_tokens
        forbidden = list(request.stop_ids) if is_early else []
        for word in request.bad_words_ids:
            split = len(request.token_ids) - len(word) + 1
            if split >= 0 and request.token_ids[split:] == list(word[:-1]):
                forbidden.append(word[-1])
        return forbidden


def sampled_rows(plan: StepPlan) -> list[SampledRow]:
    """The plan's rows of logits, in the order of `StepArrays.logits_rows`."""
    rows: list[SampledRow] = []
    for index, planned in enumerate(plan.requests):
        request, start, num_tokens, samples_token, _ = planned
        if request.params.prompt_logprobs is not None:
            rows.extend(
                SampledRow(index, request, start + i + 1, request.token_ids[start + i + 1])
                for i in range(planned.num_prompt_rows)
            )
        if samples_token:
            rows.append(SampledRow(index, request, start + num_tokens, -1))
    return rows
