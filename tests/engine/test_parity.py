"""Greedy tokens equal those of transformers, however the engine schedules requests."""

from __future__ import annotations

import pytest

from portalm import LLM, SamplingParams
from tests.engine.oracle import NUM_OUT, Answer, Oracle

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUT, ignore_eos=True)


def make_llm(**settings: object) -> LLM:
    return LLM(device="cpu", use_tqdm=False, **{"dtype": "float32", **settings})


def generated(llm: LLM, answers: list[Answer]) -> list[list[int]]:
    outputs = llm.generate([a.prompt for a in answers], GREEDY, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs]


def test_alone(answers: list[Answer]) -> None:
    llm = make_llm(enable_prefix_caching=False)

    actual = [generated(llm, [answer])[0] for answer in answers]

    assert actual == [a.token_ids for a in answers]


def test_all_in_one_batch(answers: list[Answer]) -> None:
    llm = make_llm(enable_prefix_caching=False)

    actual = generated(llm, answers)

    assert actual == [a.token_ids for a in answers]


def test_with_chunked_prefill(answers: list[Answer]) -> None:
    llm = make_llm(max_num_batched_tokens=64, max_num_seqs=16, enable_prefix_caching=False)

    actual = generated(llm, answers)

    assert llm.get_metrics().last_step_tokens <= 64
    assert actual == [a.token_ids for a in answers]


def test_with_a_prefix_hit(answers: list[Answer]) -> None:
    llm = make_llm()
    generated(llm, answers)

    outputs = llm.generate([a.prompt for a in answers], GREEDY, use_tqdm=False)

    assert [o.num_cached_tokens for o in outputs] == [
        (len(a.prompt) - 1) // 16 * 16 for a in answers
    ]
    assert [o.outputs[0].token_ids for o in outputs] == [a.token_ids for a in answers]


def test_after_preemption(answers: list[Answer]) -> None:
    # blocks for little more than the longest request: the whole batch does not fit
    llm = make_llm(num_gpu_blocks_override=130, max_model_len=2048, enable_prefix_caching=False)

    actual = generated(llm, answers)

    assert llm.get_metrics().preemptions_total > 0
    assert actual == [a.token_ids for a in answers]


def test_bfloat16_differs_only_at_near_ties(answers: list[Answer], oracle: Oracle) -> None:
    llm = make_llm(dtype="bfloat16", quantization="none")

    actual = generated(llm, answers)

    num_equal = 0
    for answer, token_ids in zip(answers, actual, strict=True):
        pairs = zip(answer.token_ids, token_ids, strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            num_equal += 1
            continue
        noise = oracle.bf16_noise(answer.prompt + answer.token_ids[:first])
        # both logits that are compared may differ by the noise
        assert answer.margins[first] < 2 * noise, (len(answer.prompt), first)
    assert num_equal > 0
