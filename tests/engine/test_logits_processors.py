"""Logits processors of another package, on random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portalm import LLM, SamplingParams
from portalm.errors import InvalidRequest
from tests.tiny import VOCAB_SIZE, add_byte_tokenizer, make_config_folder

PLUGINS = Path(__file__).parents[1] / "plugins"
PROMPTS = [[5 + i, 6, 7] for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGINS))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("processors") / "tiny"))


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(
        str(folder), load_format="dummy", max_num_seqs=8, max_num_batched_tokens=64,
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return make_llm(folder)


def greedy(processors: dict[str, Any], **more: Any) -> SamplingParams:
    settings = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    return SamplingParams(logits_processors=processors, **settings, **more)


def no_repeats(last: int) -> SamplingParams:
    return greedy({"no_repeats": {"last": last}})


MIXED = [no_repeats(8), greedy({}), no_repeats(2), greedy({}), no_repeats(24), greedy({})]


def answers(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(PROMPTS[: len(params)], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def repeats(ids: list[int], last: int) -> bool:
    return any(token_id in ids[max(0, i - last) : i] for i, token_id in enumerate(ids))


def test_each_row_gets_the_biases_of_its_own_request(llm: LLM) -> None:
    plain = answers(llm, [greedy({})] * 6)
    assert all(repeats(ids, 8) for ids in plain)  # otherwise the assertions below prove nothing

    mixed = answers(llm, MIXED)

    assert [repeats(mixed[i], last) for i, last in ((0, 8), (2, 2), (4, 24))] == [False] * 3
    assert [mixed[i] for i in (1, 3, 5)] == [plain[i] for i in (1, 3, 5)]


def test_preemption_changes_no_token(folder: Path, llm: LLM) -> None:
    small = make_llm(
        folder, max_model_len=64, block_size=16, num_gpu_blocks_override=7,
        enable_prefix_caching=False,
    )  # fmt: skip

    assert answers(small, MIXED) == answers(llm, MIXED)
    assert small.get_metrics().preemptions_total > 0


def test_a_request_with_a_processor_waits_for_its_last_token() -> None:
    assert no_repeats(8).needs_history and not greedy({}).needs_history


def test_biases_are_added_to_logit_bias(llm: LLM) -> None:
    # the two biases on token 9 cancel out, so that the one on token 11 decides
    careless = {"careless": [[0], [9], [100.0]]}
    ids = answers(llm, [greedy(careless, logit_bias={9: -100.0, 11: 50.0})])[0]

    assert set(ids) == {11}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([[0], [1]], "TypeError"),
        ([[0], [1, 2], [0.0]], "equally long"),
        ([[1], [1], [0.0]], "rows must be from 0 to 0"),
        ([[0], [VOCAB_SIZE], [0.0]], f"token_ids must be from 0 to {VOCAB_SIZE - 1}"),
        ([[0], [-1], [0.0]], "token_ids must be from 0"),
        ([[0], [0.5], [0.0]], "token_ids must be integers"),
        ([[0], [1], [float("nan")]], "finite or -inf"),
        ([[0], [1], [float("inf")]], "finite or -inf"),
    ],
)
def test_a_processor_that_fails_ends_the_requests_that_use_it(
    llm: LLM, given: list[Any], why: str
) -> None:
    [untouched] = answers(llm, [greedy({})])

    one, other = llm.generate(
        PROMPTS[:2], [greedy({}), greedy({"careless": given})], use_tqdm=False
    )

    assert list(one.outputs[0].token_ids) == untouched
    assert other.outputs[0].finish_reason == "error"
    assert "logits processor 'careless' failed" in other.error and why in other.error


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"unknown": None}, "no logits processor 'unknown'; installed: careless, missing"),
        ({"missing": None}, "cannot be imported"),
        ({"stranger": None}, "not a subclass of portalm.logits_processor.LogitsProcessor"),
        ({"no_repeats": 3}, 'no_repeats does not accept 3: its argument must be {"last": N}'),
        ({"careless": object()}, "careless does not accept <object"),
        (["no_repeats"], "must map names"),
        ({1: None}, "must map names"),
    ],
)
def test_invalid_parameters_are_refused_with_the_reason(llm: LLM, asked: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        llm.generate(PROMPTS[0], SamplingParams(logits_processors=asked, detokenize=False))

    assert caught.value.param == "logits_processors"
