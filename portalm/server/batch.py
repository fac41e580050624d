"""OpenAI's batch files, processed by the server's own application without a socket.

An input line has {"custom_id", "method", "url", "body"}. Its output line has {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}: "response" is the server's response
at that URL, including error responses; "error" is set if the input line is malformed.
https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.server.app import build_app
from portalm.server.chat_plan import AnswerFormat
from portalm.server.errors import error_object
from portalm.server.observability.metrics import Metrics
from portalm.server.state import ServerState, new_id


class BadLine(Exception):
    """A malformed line of the batch file."""


class BatchRunner:
    """Processes the lines of one batch file concurrently."""

    def __init__(self, app: FastAPI, *, max_in_flight: int) -> None:
        """Use an application whose engine is running.

        Args:
            app: the server's application, made by `build_app`.
            max_in_flight: maximum number of lines processed, and held in memory, at once.
        """
        self._app = app
        self._urls = sorted(
            path for path, operations in app.openapi()["paths"].items() if "post" in operations
        )
        self._room = asyncio.Semaphore(max_in_flight)
        self._seen_ids: set[str] = set()

    async def run(self, lines: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield output lines in the order in which they finish; custom_id identifies the input."""
        answers: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        # an exception in the application becomes a response with status 500
        transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as http:
            reading = asyncio.create_task(self._process_all(http, lines, answers))
            try:
                while (answer := await answers.get()) is not None:
                    if isinstance(answer, BaseException):
                        raise answer
                    yield answer
                    self._room.release()
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _process_all(
        self,
        http: httpx.AsyncClient,
        lines: AsyncIterator[bytes],
        answers: asyncio.Queue[dict[str, Any] | BaseException | None],
    ) -> None:
        running: set[asyncio.Task[None]] = set()

        async def process(number: int, line: bytes) -> None:
            try:
                answers.put_nowait(await self._answer(http, number, line))
            except Exception as error:
                answers.put_nowait(error)

        try:
            number = 0
            await self._room.acquire()
            async for line in lines:
                number += 1
                if line.strip():
                    task = asyncio.create_task(process(number, line))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    await self._room.acquire()
            await asyncio.gather(*running)
            answers.put_nowait(None)
        except Exception as error:  # the file cannot be read
            answers.put_nowait(error)
        finally:
            for task in running:
                task.cancel()

    async def _answer(self, http: httpx.AsyncClient, number: int, line: bytes) -> dict[str, Any]:
        custom_id: str | None = None
        try:
            request = _parse(line)
            custom_id = request.get("custom_id")
            self._check(request)
        except BadLine as problem:
            error = {"code": "invalid_line", "message": f"line {number}: {problem}"}
            return _result(custom_id, response=None, error=error)
        answer = await http.post(request["url"], json=request["body"])
        response = {
            "status_code": answer.status_code,
            "request_id": new_id("req"),
            "body": _body(answer),
        }
        return _result(custom_id, response=response, error=None)

    def _check(self, request: dict[str, Any]) -> None:
        custom_id, url = request.get("custom_id"), request.get("url")
        if not isinstance(custom_id, str) or not custom_id:
            raise BadLine("custom_id must be a non-empty string")
        if custom_id in self._seen_ids:
            raise BadLine(f"custom_id {custom_id!r} was used by an earlier line")
        self._seen_ids.add(custom_id)
        if request.get("method") != "POST":
            raise BadLine(f"method must be POST, not {request.get('method')!r}")
        if url not in self._urls:
            raise BadLine(f"url must be one of {', '.join(self._urls)}, not {url!r}")
        if not isinstance(request.get("body"), dict):
            raise BadLine("body must be an object: the request to send to that url")
        if request["body"].get("stream"):
            raise BadLine("stream must be false: each response is one line")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise BadLine(f"not valid JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadLine("not a JSON object")
    return request


def _body(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return error_object(answer.status_code, answer.text)


def _result(
    custom_id: str | None, *, response: dict[str, Any] | None, error: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "id": new_id("batch_req"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


async def answer_lines(
    engine: EngineConfig,
    lines: AsyncIterator[bytes],
    *,
    served_model_names: Sequence[str] = (),
    max_in_flight: int = 256,
    form: AnswerFormat | None = None,
) -> AsyncGenerator[dict[str, Any], None]:
    """Start an engine, process the lines of a batch file, and shut the engine down.

    Args:
        engine: settings of the engine.
        lines: lines of the file.
        served_model_names: names of the model that lines may use; empty: the engine's setting.
        max_in_flight: maximum number of lines processed at once.
        form: how the model writes tool calls and reasoning; None: detect it from the chat
            template.

    Yields:
        Output lines in the order in which they finish.

    Raises:
        PortaLMError: the engine could not start, or tool calls are required and not possible.
    """
    client = EngineClient(engine)
    try:
        await client.start()
        form = form or AnswerFormat()
        form.check(client.tokenizer)
        names = tuple(served_model_names) or (engine.model,)
        state = ServerState(
            client=client,
            metrics=Metrics(client, names[0]),
            model_names=names,
            answer_format=form,
        )
        async for answer in BatchRunner(build_app(state), max_in_flight=max_in_flight).run(lines):
            yield answer
    finally:
        await client.shutdown()
