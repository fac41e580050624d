"""Batch files over an application: requests in flight, and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI

from portalm.server.batch import BatchRunner

app = FastAPI()
in_flight = 0
most_in_flight = 0


@app.post("/slow")
async def slow() -> dict[str, bool]:
    global in_flight, most_in_flight
    in_flight += 1
    most_in_flight = max(most_in_flight, in_flight)
    for _ in range(200):  # turns of the event loop, in which other requests arrive
        await asyncio.sleep(0)
    in_flight -= 1
    return {"done": True}


@app.post("/broken")
async def broken() -> None:
    raise RuntimeError("an error of the server")


async def lines(urls: list[str]) -> AsyncIterator[bytes]:
    for i, url in enumerate(urls):
        yield json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": {}}).encode()


def answers(requests: AsyncIterator[bytes], *, max_in_flight: int = 8) -> list[Any]:
    async def collect() -> list[Any]:
        runner = BatchRunner(app, max_in_flight=max_in_flight)
        return [answer async for answer in runner.run(requests)]

    return asyncio.run(collect())


def test_max_in_flight_is_used_and_not_exceeded() -> None:
    found = answers(lines(["/slow"] * 20), max_in_flight=3)

    assert len(found) == 20
    assert most_in_flight == 3


def test_a_server_error_fails_only_its_line() -> None:
    found = answers(lines(["/slow", "/broken", "/slow"]))

    by_id = {one["custom_id"]: one["response"] for one in found}
    assert [by_id[i]["status_code"] for i in "012"] == [200, 500, 200]
    assert by_id["1"]["body"]["error"]["message"] == "Internal Server Error"


def test_an_error_while_reading_the_file_is_raised() -> None:
    async def torn() -> AsyncIterator[bytes]:
        async for line in lines(["/slow"]):
            yield line
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        answers(torn())
