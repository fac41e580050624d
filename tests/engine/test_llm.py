"""The offline API on the default model, including bad input."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from portalm import LLM, SamplingParams
from portalm.errors import BackendUnavailable, ConfigError, InvalidRequest, ModelNotFound

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return LLM(use_tqdm=False, dtype="float32", max_model_len=1024)


def text(llm: LLM, prompt: object, **params: object) -> str:
    settings = {"temperature": 0.0, "max_tokens": 8, **params}
    [output] = llm.generate(prompt, SamplingParams(**settings), use_tqdm=False)
    return output.outputs[0].text


def test_a_prompt_may_be_a_text_token_ids_or_a_list_of_either(llm: LLM) -> None:
    prompt = "The capital of France is"
    ids = llm.get_tokenizer().encode(prompt)

    alone = text(llm, prompt)

    assert "Paris" in alone
    assert text(llm, ids) == alone
    both = llm.generate([prompt, ids], GREEDY, use_tqdm=False)
    assert [o.outputs[0].text for o in both] == [alone, alone]
    assert both[0].prompt == prompt and both[1].prompt is None


def test_an_answer_reports_its_timing(llm: LLM) -> None:
    [output] = llm.generate("The capital of France is", GREEDY, use_tqdm=False)

    times = output.metrics
    assert times.e2e_s == pytest.approx(times.queue_s + times.prefill_s + times.decode_s)
    assert min(times.queue_s, times.prefill_s, times.decode_s) > 0


def test_streamed_deltas_add_up_to_the_answer(llm: LLM) -> None:
    prompt = "Write a haiku about the sea, with an emoji 🌊:"
    params = SamplingParams(temperature=0.0, max_tokens=40)

    deltas = list(llm.stream(prompt, params))

    [whole] = llm.generate(prompt, params, use_tqdm=False)
    assert "".join(d.text for d in deltas) == whole.outputs[0].text
    assert [t for d in deltas for t in d.token_ids] == whole.outputs[0].token_ids
    assert deltas[-1].finish_reason == whole.outputs[0].finish_reason


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    stream = llm.stream("Count:", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()

    until = time.monotonic() + 30  # a step that is on the device ends first
    while llm.get_metrics().num_used_blocks:
        assert time.monotonic() < until


def test_chat_uses_the_models_template(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "What is 2 + 2?"}], GREEDY, use_tqdm=False)

    assert "answer" in output.outputs[0].text
    start = llm.get_tokenizer().encode("<|im_start|>", add_special_tokens=False)
    assert output.prompt_token_ids[0] == start[0]


def test_n_answers_share_a_prompt_and_differ_by_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12)

    [output] = llm.generate("Once upon a time", params, use_tqdm=False)

    assert [a.index for a in output.outputs] == [0, 1, 2, 3]
    assert len({a.text for a in output.outputs}) > 1
    for i, answer in enumerate(output.outputs):
        alone = text(llm, "Once upon a time", temperature=1.0, seed=3 + i, max_tokens=12)
        assert answer.text == alone


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=11, max_tokens=16)
    others = [SamplingParams(temperature=1.0, max_tokens=16, seed=i) for i in range(5)]

    [alone] = llm.generate("My favorite color", params, use_tqdm=False)
    batch = llm.generate(
        ["My favorite color", *[f"Story {i}:" for i in range(5)]],
        [params, *others],
        use_tqdm=False,
    )

    assert batch[0].outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    free = text(llm, "The capital of France is", max_tokens=16)
    stop = free[4:8]

    [output] = llm.generate(
        "The capital of France is",
        SamplingParams(temperature=0.0, max_tokens=16, stop=[stop]),
        use_tqdm=False,
    )

    assert output.outputs[0].text == free[: free.index(stop)]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop


def test_logprobs_are_of_the_sampled_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=1)

    [output] = llm.generate("One two three four", params, use_tqdm=False)

    answer = output.outputs[0]
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(entry)) == token_id
        assert entry[token_id].rank == 1
        assert len(entry) == 3
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert answer.cumulative_logprob == pytest.approx(
        sum(next(iter(e.values())).logprob for e in answer.logprobs)
    )


def test_forbidden_and_allowed_tokens_are_respected(llm: LLM) -> None:
    [free] = llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    first = free.outputs[0].token_ids[0]
    word = llm.get_tokenizer().decode([first]).strip()

    for params in (
        {"logit_bias": {first: -100.0}},
        {"bad_words": [word]},
        {"allowed_token_ids": [first + 1, first + 2]},
    ):
        settings = {"temperature": 0.0, "max_tokens": 1, **params}
        [output] = llm.generate(
            "The capital of France is", SamplingParams(**settings), use_tqdm=False
        )
        assert output.outputs[0].token_ids[0] != first, params


def test_min_tokens_delays_the_end(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say only: yes"}]
    params = SamplingParams(temperature=0.0, max_tokens=60, min_tokens=50)

    [output] = llm.chat(messages, params, use_tqdm=False)

    assert len(output.outputs[0].token_ids) >= 50


def test_cached_prompt_tokens_are_counted(llm: LLM) -> None:
    prompt = list(range(1000, 1100))
    llm.generate(prompt, GREEDY, use_tqdm=False)

    [output] = llm.generate(prompt, GREEDY, use_tqdm=False)

    assert output.num_cached_tokens == 96
    assert llm.reset_prefix_cache()


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([5, 49152], r"token id 49152, outside the vocabulary \(0 to 49151\)"),
        ([5, -1], "token id -1"),
        ([5, 2.5], "must be integers"),
        ([7] * 1024, r"has 1024 tokens.*1024.*it may have at most 1023"),
    ],
    ids=["empty text", "no ids", "id too large", "negative id", "not an integer", "too long"],
)
def test_a_bad_prompt_is_refused_and_the_others_are_answered(
    llm: LLM, prompt: object, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([prompt], GREEDY, use_tqdm=False)

    assert "Paris" in text(llm, "The capital of France is")
    assert llm.get_metrics().num_used_blocks == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -3}, "max_tokens must be at least 1, not -3"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_k": -2}, "top_k must be at least 0"),
        ({"n": 0}, "n must be at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens .9. is above max_tokens"),
        ({"logprobs": 21}, "at most 20"),
        ({"stop": [""]}, "non-empty"),
        ({"logit_bias": {"x": 1}}, "token ids to numbers"),
        ({"allowed_token_ids": []}, "must not be empty"),
        ({"seed": "one"}, "seed must be an integer"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_sampling_parameters_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**values)

    assert caught.value.param in values


def test_one_bad_prompt_refuses_the_whole_batch(llm: LLM) -> None:
    before = llm.get_metrics().steps_total

    with pytest.raises(InvalidRequest):
        llm.generate(["good", ""], GREEDY, use_tqdm=False)

    assert llm.get_metrics().steps_total == before


def test_the_error_for_an_unknown_model_names_the_places_searched() -> None:
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        LLM("./nowhere", use_tqdm=False)
    with pytest.raises(ModelNotFound, match="not a Hugging Face id such as"):
        LLM("nonsense", use_tqdm=False)


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'gpu_count'"):
        LLM(gpu_count=3)


def test_the_error_for_an_unavailable_device_names_what_is_missing() -> None:
    with pytest.raises(BackendUnavailable, match="a ROCm build is needed") as caught:
        LLM(device="rocm", use_tqdm=False)

    assert "Available on this machine: cpu" in str(caught.value)


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(
        BackendUnavailable, match="no installed package provides a backend"
    ) as caught:
        LLM(device="vax", use_tqdm=False)

    assert "installed: cpu" in str(caught.value)
