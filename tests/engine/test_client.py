"""The client of an engine in a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.output_processor import AnswerDelta
from portalm.sampling_params import SamplingParams
from tests.tiny import add_byte_tokenizer, make_config_folder

MAX_TOKENS = 8_000
"""The null device needs seconds for these."""
TOO_MANY = MAX_TOKENS // 2
"""The engine generates fewer in the time that an abort takes."""


def test_the_engine_stops_generating_when_a_stop_string_is_found(tmp_path: Path) -> None:
    folder = make_config_folder(tmp_path / "tiny", max_position_embeddings=MAX_TOKENS + 10)
    add_byte_tokenizer(folder)
    config = EngineConfig(model=str(folder), device="null", load_format="dummy")

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
