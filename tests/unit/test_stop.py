"""When a sampled token ends its request, and why."""

from __future__ import annotations

import pytest

from portalm.core.request import Request
from portalm.core.stop import finish_reason
from portalm.sampling_params import SamplingParams

EOS, STOP = 2, 7


def make_request(answer: list[int], *, max_tokens: int = 10, **params: object) -> Request:
    return Request(
        "a",
        [1, 1, 1],
        SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,), **params),
        seed=0,
        max_total_tokens=3 + max_tokens,
        eos_token_ids=[EOS],
        output_token_ids=answer,
    )


@pytest.mark.parametrize(
    ("answer", "reason", "stop_reason"),
    [
        ([5], None, None),
        ([5, EOS], "stop", None),
        ([5, STOP], "stop", STOP),
        ([EOS, 5], None, None),
        ([5] * 9, None, None),
        ([5] * 10, "length", None),
        ([5] * 9 + [EOS], "stop", None),
    ],
    ids=[
        "an ordinary token",
        "end of sequence",
        "a stop token",
        "only the last token counts",
        "one below max_tokens",
        "max_tokens",
        "a stop token takes precedence over length",
    ],
)
def test_a_stop_token_or_the_length_ends_the_answer(
    answer: list[int], reason: str | None, stop_reason: int | None
) -> None:
    request = make_request(answer)

    assert finish_reason(request) == reason
    assert request.stop_reason == stop_reason


def test_stop_tokens_in_the_prompt_do_not_end_the_answer() -> None:
    request = Request(
        "a", [1, EOS], SamplingParams(), seed=0, max_total_tokens=9, eos_token_ids=[EOS]
    )
    request.token_ids.append(5)

    assert finish_reason(request) is None


@pytest.mark.parametrize("token_id", [EOS, STOP], ids=["end of sequence", "stop token"])
def test_nothing_stops_before_min_tokens(token_id: int) -> None:
    before = make_request([5, token_id], min_tokens=2)
    after = make_request([5, 5, token_id], min_tokens=2)

    assert finish_reason(before) is None
    assert finish_reason(after) == "stop"


def test_the_length_ends_an_answer_despite_min_tokens() -> None:
    assert finish_reason(make_request([EOS, EOS], max_tokens=2, min_tokens=2)) == "length"


def test_an_ignored_end_of_sequence_does_not_end_the_answer() -> None:
    assert finish_reason(make_request([EOS], ignore_eos=True)) is None


def test_an_eos_token_that_is_also_a_stop_token_is_reported_as_such() -> None:
    request = Request(
        "a",
        [1],
        SamplingParams(stop_token_ids=(EOS,)),
        seed=0,
        max_total_tokens=9,
        eos_token_ids=[EOS],
        output_token_ids=[EOS],
    )

    assert finish_reason(request) == "stop"
    assert request.stop_reason == EOS
