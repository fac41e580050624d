"""A server in this process with a scripted model: each test sets its answer, the rest is real."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import uvicorn

from portalm.config import EngineConfig
from portalm.engine.input_processor import InputProcessor, ProcessedInput
from portalm.engine.messages import EngineStats
from portalm.engine.output_processor import AnswerDelta
from portalm.errors import RequestFailed
from portalm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.server.app import build_app
from portalm.server.observability.metrics import Metrics
from portalm.server.state import ServerState
from portalm.text import load_tokenizer


@dataclass
class ScriptedClient:
    """Replacement for `EngineClient` that answers `text`, `piece_size` characters per token."""

    folder: Path
    text: str = ""
    piece_size: int = 3
    delay_s: float = 0.0
    """Delay before each piece."""
    finish_reason: str = "stop"
    asked: list[tuple[str, SamplingParams]] = field(default_factory=list)
    """Prompt and parameters of each request."""
    num_open: int = 0
    """Answers that are being generated."""

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.folder)
        self.config = EngineConfig(model=str(self.folder))
        self.ready = SimpleNamespace(
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=100_000,
            vector_size=0,
            tasks=("generate",),
            sampling_defaults={},
        )
        self.stats = EngineStats()
        self.num_restarts = 0
        self._inputs = InputProcessor(self.tokenizer, self.ready, max_logprobs=5, default_seed=0)

    num_queued = num_queued_tokens = 0

    def check_task(self, task: str) -> None:
        assert task == "generate"

    async def check(self, request_id: str, prompt: Any, params: SamplingParams, **settings: Any):
        self.asked.append((prompt, params))
        plain = replace(params, structured_outputs=None)
        return self._inputs.process(request_id, prompt, plain, **settings)

    async def generate(
        self, inputs: Sequence[ProcessedInput], params: SamplingParams, **settings: Any
    ) -> AsyncGenerator[AnswerDelta, None]:
        [processed] = inputs
        if self.finish_reason == "error" and not self.text:
            raise RequestFailed("the script says so")
        size = self.piece_size
        pieces = [self.text[i : i + size] for i in range(0, len(self.text), size)] or [""]
        metrics = RequestMetrics(time.time())
        self.num_open += 1
        try:
            for i, piece in enumerate(pieces):
                await asyncio.sleep(self.delay_s)
                if i and self.finish_reason == "error":
                    raise RequestFailed("the script says so")
                for index in range(params.n):
                    is_end = i == len(pieces) - 1
                    delta = AnswerDelta(
                        request_id=processed.request_id,
                        index=index,
                        text=piece,
                        token_ids=[1],
                        metrics=metrics,
                    )
                    if is_end:
                        delta.finish_reason = self.finish_reason
                    if is_end and index == params.n - 1:
                        delta.final = self._final(processed, params, len(pieces))
                    yield delta
        finally:
            self.num_open -= 1

    def _final(self, processed: ProcessedInput, params: SamplingParams, count: int):
        answers = [
            CompletionOutput(i, self.text, [1] * count, finish_reason=self.finish_reason)
            for i in range(params.n)
        ]
        prompt = processed.prompt_token_ids
        return RequestOutput(processed.request_id, None, prompt, answers, finished=True)

    @property
    def prompt(self) -> str:
        """The prompt of the last request."""
        return self.asked[-1][0]


@dataclass
class ScriptedServer:
    client: ScriptedClient
    state: ServerState
    url: str

    @property
    def sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


@contextlib.contextmanager
def scripted_server(folder: Path, **settings: Any) -> Iterator[ScriptedServer]:
    client = ScriptedClient(folder)
    state = ServerState(
        client=client,  # type: ignore[arg-type]
        metrics=Metrics(client, "scripted"),  # type: ignore[arg-type]
        model_names=("scripted",),
        trust_request_chat_template=True,
        **settings,
    )
    server = uvicorn.Server(
        uvicorn.Config(build_app(state), host="127.0.0.1", port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield ScriptedServer(client, state, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(20)


def make_byte_tokenizer(folder: Path, template: str) -> Path:
    """Write a tokenizer of bytes, which can encode any text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(template)
    return folder
