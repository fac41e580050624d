"""Weights of few bits from the flag to the answer."""

from __future__ import annotations

import pytest

from portalm import LLM, SamplingParams
from portalm.errors import ConfigError, Unsupported

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("quantization", ["native", "int8", "int4"])
def test_the_default_model_answers(quantization: str) -> None:
    llm = LLM(device="cpu", quantization=quantization, use_tqdm=False)

    output = llm.generate("The capital of France is", GREEDY, use_tqdm=False)[0]

    assert output.outputs[0].text.startswith(" Paris")


@pytest.mark.parametrize("quantization", ["native", "int8"])
def test_a_backend_without_it_says_so(quantization: str) -> None:
    with pytest.raises(Unsupported, match="reference"):
        LLM(device="reference", quantization=quantization, use_tqdm=False)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        LLM(quantization="int3", use_tqdm=False)
