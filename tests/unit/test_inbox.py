"""An inbox keeps deltas in order, and merges them for a slow reader."""

from __future__ import annotations

import asyncio

import pytest

from portalm.engine.inbox import Inbox
from portalm.engine.output_processor import AnswerDelta
from portalm.errors import EngineDead
from portalm.outputs import RequestMetrics, RequestOutput


def delta(number: int, index: int = 0) -> AnswerDelta:
    return AnswerDelta(
        request_id="a",
        index=index,
        text=f"{number} ",
        token_ids=[number],
        metrics=RequestMetrics(arrival_time=0.0),
    )


def test_a_fast_reader_gets_every_delta() -> None:
    async def run() -> list[str]:
        inbox, texts = Inbox(), []
        for number in range(200):
            inbox.put(delta(number))
            texts.append((await inbox.get()).text)
        return texts

    assert asyncio.run(run()) == [f"{number} " for number in range(200)]


def test_unread_deltas_are_merged_and_nothing_is_lost() -> None:
    async def run() -> tuple[int, list[AnswerDelta]]:
        inbox = Inbox()
        for number in range(1000):
            inbox.put(delta(number, index=number % 2))
        last = delta(1000)
        last.finish_reason, last.logprobs = "length", []
        inbox.put(last)
        num_waiting = len(inbox._deltas)
        return num_waiting, [await inbox.get() for _ in range(num_waiting)]

    num_waiting, found = asyncio.run(run())

    assert num_waiting < 70
    for index in (0, 1):
        ids = [i for one in found if one.index == index for i in one.token_ids]
        assert ids == [*range(index, 1000, 2), *([1000] if index == 0 else [])]
        text = "".join(one.text for one in found if one.index == index)
        assert text == "".join(f"{i} " for i in ids)
    reasons = [one.finish_reason for one in found if one.index == 0]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_after_a_backlog_deltas_are_queued_one_by_one_again() -> None:
    async def run() -> list[list[int]]:
        inbox = Inbox()
        for number in range(100):
            inbox.put(delta(number))
        while inbox._deltas:
            await inbox.get()
        inbox.put(delta(100))
        inbox.put(delta(101))
        return [(await inbox.get()).token_ids for _ in range(2)]

    assert asyncio.run(run()) == [[100], [101]]


def test_merged_deltas_stay_in_order_when_the_queue_is_short_again() -> None:
    async def run() -> list[AnswerDelta]:
        inbox = Inbox()
        for number in range(70):  # from the 65th on they are merged
            inbox.put(delta(number))
        for number in range(70, 73):
            await inbox.get()
            inbox.put(delta(number))
        last = delta(73)
        last.finish_reason = "length"
        inbox.put(last)
        return [await inbox.get() for _ in range(len(inbox._deltas))]

    found = asyncio.run(run())

    assert [i for one in found for i in one.token_ids] == list(range(3, 74))
    assert [one.finish_reason for one in found].index("length") == len(found) - 1


def test_the_last_delta_of_a_request_comes_after_all_its_answers() -> None:
    async def run() -> list[AnswerDelta]:
        inbox = Inbox()
        for number in range(64):
            inbox.put(delta(number))
        inbox.put(delta(64, index=1))
        inbox.put(delta(65, index=0))
        last = delta(66, index=1)
        last.finish_reason = "length"
        last.final = RequestOutput(
            request_id="a", prompt=None, prompt_token_ids=[1], outputs=[], finished=True
        )
        inbox.put(last)
        return [await inbox.get() for _ in range(len(inbox._deltas))]

    *before, last = asyncio.run(run())

    assert last.is_last and last.token_ids == [64, 66]
    assert [i for one in before for i in one.token_ids] == [*range(64), 65]


def test_an_error_comes_after_the_queued_deltas() -> None:
    async def run() -> None:
        inbox = Inbox()
        inbox.put(delta(1))
        inbox.fail(EngineDead("gone"))
        assert (await inbox.get()).token_ids == [1]
        with pytest.raises(EngineDead, match="gone"):
            await inbox.get()

    asyncio.run(run())
