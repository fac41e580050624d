"""The expected answers of parity tests: greedy answers of transformers to real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.oracle import LENGTHS, Answer, Oracle


@pytest.fixture(scope="session")
def oracle(default_model: Path) -> Oracle:
    return Oracle(default_model)


@pytest.fixture(scope="session")
def answers(oracle: Oracle) -> list[Answer]:
    """20 prompts of 1 to 1,500 tokens of real text and their answers."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = oracle.tokenizer(text)["input_ids"]
    assert len(ids) > 2 * LENGTHS[-2]
    # each prompt starts elsewhere, so that they share no prefix by accident
    starts = [(37 * i) % (len(ids) - length) for i, length in enumerate(LENGTHS)]
    return [
        oracle.answer(ids[start : start + length])
        for start, length in zip(starts, LENGTHS, strict=True)
    ]
