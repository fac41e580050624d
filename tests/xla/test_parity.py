"""Greedy tokens of the default model equal those of transformers, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.engine import Engine
from portalm_backends.xla.backend import XlaBackend
from tests.engine.oracle import Answer, Oracle
from tests.tiny import ask, run, tokens

pytestmark = pytest.mark.model

LENGTHS = (1, 2, 5, 16, 17, 33, 100, 255, 700)
"""Prompt lengths in tokens: around multiples of a block, and longer than a step."""


@pytest.fixture(scope="module")
def answers(default_model: Path) -> list[Answer]:
    oracle = Oracle(default_model)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = oracle.tokenizer(text)["input_ids"]
    return [oracle.answer(ids[37 * i : 37 * i + length]) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def engine(backend: XlaBackend) -> Iterator[Engine]:
    config = EngineConfig(
        model=DEFAULT_MODEL,
        quantization="none",
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        enable_prefix_caching=False,
    )
    engine = Engine(config, backend=backend)
    yield engine
    engine.close()


def generated(engine: Engine, answers: list[Answer]) -> list[list[int]]:
    for i, answer in enumerate(answers):
        ask(engine, str(i), answer.prompt, max_tokens=len(answer.token_ids))
    found = tokens(run(engine))
    return [found[str(i)] for i in range(len(answers))]


def test_the_default_dtype_is_float32(engine: Engine) -> None:
    assert engine.ready.dtype == "float32"


def test_one_batch_with_chunked_prefill_matches_transformers(
    engine: Engine, answers: list[Answer]
) -> None:
    assert generated(engine, answers) == [a.token_ids for a in answers]


def test_single_requests_match_transformers(engine: Engine, answers: list[Answer]) -> None:
    every_third = answers[::3]

    for answer in every_third:
        assert generated(engine, [answer]) == [answer.token_ids]
