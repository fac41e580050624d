"""The two users of an engine, `EngineClient` and `LLM`, end a request at a stop string."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.output_processor import AnswerDelta
from portalm.llm import LLM
from portalm.sampling_params import SamplingParams
from tests.tiny import add_byte_tokenizer, make_config_folder

MAX_TOKENS = 8_000
"""The null device needs seconds for these."""
TOO_MANY = MAX_TOKENS // 2
"""The engine generates fewer in the time that an abort takes."""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """A tiny model with room for MAX_TOKENS, on the null device."""
    folder = make_config_folder(tmp_path / "tiny", max_position_embeddings=MAX_TOKENS + 10)
    add_byte_tokenizer(folder)
    return {"model": str(folder), "device": "null", "load_format": "dummy"}


def test_the_engine_process_stops_generating_at_a_stop_string(settings: dict[str, str]) -> None:
    config = EngineConfig(**settings)

    async def generate(client: EngineClient, stop: str | None, max_tokens: int) -> AnswerDelta:
        params = SamplingParams(stop=stop, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        checked = await client.check(f"r{max_tokens}", [1, 5, 6], params)
        *_, last = [delta async for delta in client.generate([checked], params)]
        return last

    async def run() -> None:
        client = EngineClient(config)
        try:
            await client.start()
            plain = await generate(client, None, 40)
            assert plain.final is not None
            text = plain.final.outputs[0].text
            stopped = await generate(client, text[20:24], MAX_TOKENS)
            assert (stopped.finish_reason, stopped.stop_reason) == ("stop", text[20:24])

            # later requests carry the engine's statistics; without an abort it would run on
            while client.stats.num_running and client.stats.generation_tokens_total < TOO_MANY:
                await generate(client, None, 1)
            assert client.stats.num_running == 0
            assert client.stats.generation_tokens_total < TOO_MANY
        finally:
            await client.shutdown()

    asyncio.run(run())


def test_the_engine_in_this_process_stops_generating_at_a_stop_string(
    settings: dict[str, str],
) -> None:
    llm = LLM(**settings, use_tqdm=False)
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    [plain] = llm.generate([[1, 5, 6]], greedy, use_tqdm=False)
    stop = plain.outputs[0].text[20:24]

    params = dataclasses.replace(greedy, max_tokens=MAX_TOKENS, stop=(stop,))
    [stopped] = llm.generate([[1, 5, 6]], params, use_tqdm=False)

    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    # without an abort it would run on
    while llm.get_metrics().num_running and llm.get_metrics().generation_tokens_total < TOO_MANY:
        pass
    assert llm.get_metrics().generation_tokens_total < TOO_MANY
