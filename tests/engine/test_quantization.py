"""Quantized weights and KV caches, from the flag to the answer."""

from __future__ import annotations

import pytest

from portalm import LLM, SamplingParams
from portalm.errors import ConfigError, Unsupported

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
def test_the_default_model_answers(quantization: str) -> None:
    llm = LLM(device="cpu", quantization=quantization, use_tqdm=False)

    output = llm.generate("The capital of France is", GREEDY, use_tqdm=False)[0]

    assert output.outputs[0].text.startswith(" Paris")


def test_quantized_weights_are_kept_by_default() -> None:
    """The first tokens equal those of dequantized weights, with nearly the same logprobs."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    by_dtype = {}
    for quantization in ("auto", "none"):
        llm = LLM(device="cpu", dtype="bfloat16", quantization=quantization, use_tqdm=False)
        answer = llm.generate("The capital of France is", params, use_tqdm=False)[0].outputs[0]
        assert answer.cumulative_logprob is not None
        by_dtype[quantization] = (answer.token_ids, answer.cumulative_logprob)

    (tokens, logprob), (expected, expected_logprob) = by_dtype["auto"], by_dtype["none"]
    assert tokens == expected
    assert logprob == pytest.approx(expected_logprob, abs=0.1)
    assert logprob != expected_logprob  # different, so these weights were not dequantized


def test_an_8_bit_kv_cache_starts_the_same_answer() -> None:
    """The first tokens equal those of a 16-bit cache, with nearly the same logprobs."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    answers = {}
    for dtype in ("bfloat16", "int8"):
        llm = LLM(device="cpu", dtype="bfloat16", kv_cache_dtype=dtype, use_tqdm=False)
        answers[dtype] = llm.generate("The capital of France is", params, use_tqdm=False)[0]

    exact, rounded = (answer.outputs[0] for answer in answers.values())
    assert rounded.token_ids == exact.token_ids
    assert rounded.cumulative_logprob == pytest.approx(exact.cumulative_logprob, abs=0.4)
    assert rounded.cumulative_logprob != exact.cumulative_logprob


def test_a_backend_without_quantization_refuses_it() -> None:
    with pytest.raises(Unsupported, match="reference"):
        LLM(device="reference", quantization="int8", use_tqdm=False)


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        LLM(quantization="int3", use_tqdm=False)
