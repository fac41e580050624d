"""Which outcome a row of logits gives its request."""

from __future__ import annotations

from portalm.core.plan import Failed, Refused, Sampled, TokenLogprobs
from portalm.core.request import Request
from portalm.runner.sampled_rows import SampledRow
from portalm.runner.step_results import outcome_of
from portalm.sampling_params import SamplingParams


def make_row(*, refusal: str | None = None, fault: str | None = None) -> SampledRow:
    request = Request("a", [1, 2, 3], SamplingParams(), seed=0, max_total_tokens=8)
    return SampledRow(0, request, position=3, target=-1, refusal=refusal, fault=fault)


def test_a_token_is_sampled_with_its_logprobs() -> None:
    entry = TokenLogprobs(7, -0.5, 1, [])

    assert outcome_of(make_row(), 7, None) == Sampled([7])
    assert outcome_of(make_row(), 7, entry) == Sampled([7], [entry])


def test_a_row_without_a_token_failed_and_names_the_last_token_computed() -> None:
    outcome = outcome_of(make_row(), -1, None)

    assert isinstance(outcome, Failed)
    assert "logits after token 2 contain NaN" in outcome.reason


def test_a_row_whose_request_forbids_every_token_is_refused() -> None:
    assert outcome_of(make_row(refusal="no token is left"), -1, None) == Refused("no token is left")


def test_a_failed_logits_processor_fails_its_request_whatever_was_sampled() -> None:
    assert outcome_of(make_row(fault="it raised"), 7, None) == Failed("it raised")
