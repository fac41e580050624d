"""The client side of an engine process: requests in, streams of answer deltas out."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from portalm.config import EngineConfig, engine_environment
from portalm.engine.input_processor import InputProcessor, ProcessedInput
from portalm.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    ResetPrefixCache,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.errors import EngineDead, InvalidRequest, PortaLMError
from portalm.models.hub import resolve_model
from portalm.sampling_params import SamplingParams
from portalm.text.tokenizer import Tokenizer, load_tokenizer

_TERMINATE_S = 5.0
"""Seconds between asking an engine process to end and killing it."""


class EngineClient:
    """An engine in its own process. All methods belong to one event loop.

    Detokenising and stop strings are done here, so that the engine never waits for text.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Nothing runs before `start`."""
        self.config = config
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self.last_news_time = 0.0
        """time.monotonic() of the engine's last message."""
        self._folder = Path(tempfile.mkdtemp(prefix="portalm-"))  # only this user may enter it
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._queues: dict[str, asyncio.Queue[AnswerDelta | EngineDead]] = {}
        self._dead: EngineDead | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Start the process and wait until its model is loaded.

        Raises:
            PortaLMError: it could not start; the text is the engine's own.
        """
        address = f"ipc://{self._folder}/engine"
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        # fetched here, once, so that the engine and the tokenizer find it in the cache
        path = await asyncio.to_thread(
            resolve_model, self.config.tokenizer or self.config.model, revision=self.config.revision
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "portalm.engine.core_process",
            address,
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=engine_environment(),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self.config))
        self._process.stdin.close()
        self._tokenizer = await asyncio.to_thread(
            load_tokenizer,
            path,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
        )
        message = await self._first_message()
        if not isinstance(message, EngineReady):
            text = message.message if isinstance(message, EngineFailed) else "no word of readiness"
            raise PortaLMError(text)
        self.ready = message
        self._inputs = InputProcessor(
            self._tokenizer,
            message,
            max_logprobs=self.config.max_logprobs,
            default_seed=self.config.seed,
        )
        self._outputs = OutputProcessor(self._tokenizer)
        self._reader = asyncio.create_task(self._read())
        return message

    async def _first_message(self) -> FromEngine:
        assert self._process is not None
        received = asyncio.ensure_future(self._socket.recv())
        ended = asyncio.ensure_future(self._process.wait())
        await asyncio.wait({received, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not received.done():
            await asyncio.wait({received}, timeout=1.0)  # its last words may be on their way
        ended.cancel()
        if received.done():
            message: FromEngine = self._decoder.decode(received.result())
            return message
        received.cancel()
        raise PortaLMError(
            f"the engine process ended with status {self._process.returncode} before its model "
            f"was loaded; its messages are above"
        )

    async def shutdown(self) -> None:
        """End the process: ask it, then terminate it, then kill it. Streams end as dead."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(zmq.ZMQError):
                await self._send(Shutdown())
            for end in (process.terminate, process.kill):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), _TERMINATE_S)
                    break
                end()
            await process.wait()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._die("the engine was shut down")
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_alive(self) -> bool:
        """The engine has started and has not ended."""
        return (
            self._dead is None
            and self.ready is not None
            and self._process is not None
            and self._process.returncode is None
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def num_open(self) -> int:
        """Requests whose answers have not ended."""
        return len(self._queues)

    # -- requests -----------------------------------------------------------------------------

    def check(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ProcessedInput:
        """What `generate` will ask the engine. Raises `InvalidRequest`."""
        if request_id in self._queues:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        return self._inputs.process(
            request_id, prompt, params, priority=priority, cache_salt=cache_salt
        )

    async def generate(
        self, processed: ProcessedInput, params: SamplingParams
    ) -> AsyncIterator[AnswerDelta]:
        """The answers, piece by piece, until the last has ended.

        Closing or cancelling the iterator aborts what is left of the request.

        Raises:
            EngineDead: the engine ended before the answers did.
        """
        if self._dead is not None:
            raise self._dead
        request_id = processed.request_id
        queue: asyncio.Queue[AnswerDelta | EngineDead] = asyncio.Queue()
        self._queues[request_id] = queue
        self._outputs.add(processed, params, arrival_time=time.time())
        try:
            for message in processed.requests:
                await self._send(message)
            while True:
                news = await queue.get()
                if isinstance(news, EngineDead):
                    raise news
                yield news
                if news.is_last:
                    return
        finally:
            del self._queues[request_id]
            open_ids = self._outputs.engine_ids(request_id)
            self._outputs.forget(request_id)
            if open_ids and self._dead is None:
                # not awaited: this may run while the task is being cancelled
                self._socket.send(self._encoder.encode(AbortRequests(open_ids)))

    async def reset_prefix_cache(self) -> None:
        """Forget cached blocks that nobody holds."""
        await self._send(ResetPrefixCache())

    # -- inside -------------------------------------------------------------------------------

    async def _send(self, message: ToEngine) -> None:
        await self._socket.send(self._encoder.encode(message))

    async def _read(self) -> None:
        """Hand out the engine's news until it ends."""
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        reason = "the engine process ended"
        while True:
            received = asyncio.ensure_future(self._socket.recv())
            try:
                await asyncio.wait({received, ended}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                received.cancel()
                ended.cancel()
                raise
            if not received.done():
                received.cancel()
                break
            message = self._decoder.decode(received.result())
            self.last_news_time = time.monotonic()
            if isinstance(message, EngineFailed):
                reason = message.message
                break
            if isinstance(message, StepOutputs):
                await self._give_out(message)
        self._die(reason)

    async def _give_out(self, message: StepOutputs) -> None:
        self.stats = message.stats
        processed = self._outputs.process(message.outputs)
        for delta in processed.deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)
        if processed.abort_ids:
            await self._send(AbortRequests(processed.abort_ids))

    def _die(self, reason: str) -> None:
        if self._dead is None:
            self._dead = EngineDead(reason)
        for queue in self._queues.values():
            queue.put_nowait(self._dead)
