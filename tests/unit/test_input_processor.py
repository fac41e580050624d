"""Prompts and parameters are checked and converted to requests for the engine."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from portalm.engine.input_processor import MAX_LABEL, InputProcessor, TextPair
from portalm.engine.messages import EngineReady
from portalm.errors import InvalidRequest, RequestTooLarge
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm.text.chat_template import ChatTemplates
from portalm.text.rust_tokenizer import set_bos_and_eos, wrap
from portalm.text.tokenizer import Tokenizer

VOCAB_SIZE, MAX_MODEL_LEN = 32, 16


def letters() -> Tokenizer:
    """One token per lowercase letter; a text begins with <s>; `z` is outside the vocabulary."""
    vocab = {char: i for i, char in enumerate("_abcdefghijklmnopqrstuvwxy")} | {"z": 40}
    rust = RustTokenizer(models.BPE(vocab, []))
    rust.normalizer = normalizers.Replace(" ", "_")
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    rust.add_special_tokens([AddedToken("<s>")])
    set_bos_and_eos(rust, bos="<s>", eos=None)
    return wrap(rust, {"bos_token": "<s>"}, ChatTemplates({}))


def make(
    tokenizer: Tokenizer | None = None,
    *,
    default_seed: int = 0,
    tasks: tuple[str, ...] = ("generate",),
) -> InputProcessor:
    ready = EngineReady(
        model="m",
        device="d",
        device_summary="",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[],
        max_model_len=MAX_MODEL_LEN,
        num_blocks=8,
        block_size=16,
        tasks=tasks,
        vector_size=6,
        startup_s={},
    )
    return InputProcessor(tokenizer, ready, max_logprobs=3, default_seed=default_seed)


def test_a_text_is_tokenized_with_the_models_special_tokens():
    tokenizer = letters()
    processed = make(tokenizer).process("r", "ab", SamplingParams())

    [request] = processed.requests
    assert (processed.request_id, request.request_id) == ("r", "r")
    assert processed.prompt == "ab"
    assert request.prompt_token_ids == processed.prompt_token_ids == [tokenizer.bos_token_id, 1, 2]


def test_token_ids_are_passed_on_unchanged():
    processed = make().process("r", (5, 6), SamplingParams(), priority=3, cache_salt="s")

    [request] = processed.requests
    assert processed.prompt is None
    assert request.prompt_token_ids == [5, 6]
    assert (request.priority, request.cache_salt, request.fork_of) == (3, "s", None)


@pytest.mark.parametrize("prompt", ["abcdef", [27, 1, 2, 3, 4, 5, 6]])
def test_a_prompt_is_truncated_to_its_last_tokens(prompt):
    def left(limit: int, max_tokens: int = 1) -> list[int]:
        params = SamplingParams(max_tokens=max_tokens)
        processed = make(letters()).process("r", prompt, params, truncate_prompt_tokens=limit)
        assert processed.prompt is None  # the text is not the prompt's any more
        return processed.prompt_token_ids

    assert left(2) == [5, 6]
    assert left(100)[1:] == [1, 2, 3, 4, 5, 6]
    assert left(-1, max_tokens=MAX_MODEL_LEN - 3) == [4, 5, 6]
    assert left(-1, max_tokens=MAX_MODEL_LEN + 1) == [6]
    with pytest.raises(InvalidRequest, match="empty"):
        left(0)


def test_each_answer_is_a_fork_of_the_first_with_the_next_seed():
    params = SamplingParams(n=3, seed=7, prompt_logprobs=1)

    first, *forks = make().process("r", [1], params).requests

    assert [first.request_id, *(r.request_id for r in forks)] == ["r-0", "r-1", "r-2"]
    assert [first.fork_of, *(r.fork_of for r in forks)] == [None, "r-0", "r-0"]
    assert [first.seed, *(r.seed for r in forks)] == [7, 8, 9]
    assert {r.params.n for r in (first, *forks)} == {1}
    # the answers share the prompt: one returns its logprobs
    assert [first.params.prompt_logprobs, *(r.params.prompt_logprobs for r in forks)] == [
        1,
        None,
        None,
    ]


def test_seeds_wrap_to_64_bits():
    params = SamplingParams(n=2, seed=2**63 - 1)

    assert [r.seed for r in make().process("r", [1], params).requests] == [2**63 - 1, -(2**63)]


def test_missing_seeds_are_derived_from_the_default_seed():
    def seeds(default_seed: int) -> list[int]:
        processor = make(default_seed=default_seed)
        return [processor.process(str(i), [1], SamplingParams()).requests[0].seed for i in range(3)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 6


def test_stop_strings_are_not_sent_to_the_engine():
    params = SamplingParams(stop=["x"], stop_token_ids=[3], temperature=0.5)

    [request] = make(letters()).process("r", "a", params).requests

    assert request.params == SamplingParams(stop_token_ids=[3], temperature=0.5)


def test_bad_words_are_tokenized_with_and_without_a_leading_space():
    [request] = make(letters()).process("r", "a", SamplingParams(bad_words=["bc", " d"])).requests

    assert request.bad_words_ids == [[2, 3], [0, 2, 3], [0, 4]]
    assert request.params.needs_history


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "prompt is empty"),
        ([1, "a"], "must be integers, not 'a'"),
        ([1, 2.0], "must be integers"),
        ([1, -1], r"-1, outside the vocabulary \(0 to 31\)"),
        ([VOCAB_SIZE], "32, outside the vocabulary"),
        (None, "must be a string or a list of token ids, not NoneType"),
        ({"prompt": "a"}, "not dict"),
        (b"ab", "not bytes"),
        ("az", "40, outside the vocabulary"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(prompt, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        make(letters()).process("r", prompt, SamplingParams())

    assert caught.value.param == "prompt"


def test_an_empty_text_is_refused_if_the_model_has_no_bos():
    tokenizer = letters()
    rust_without_bos = RustTokenizer(models.BPE({"a": 0}, []))
    assert make(tokenizer).process("r", "", SamplingParams()).prompt_token_ids

    with pytest.raises(InvalidRequest, match="prompt is empty"):
        make(wrap(rust_without_bos, {}, ChatTemplates({}))).process("r", "", SamplingParams())


def test_a_prompt_must_leave_room_for_one_token():
    make().process("r", [1] * (MAX_MODEL_LEN - 1), SamplingParams())

    with pytest.raises(RequestTooLarge, match=r"16 tokens.*max_model_len 16.*at most 15"):
        make().process("r", [1] * MAX_MODEL_LEN, SamplingParams())


@pytest.mark.parametrize(
    ("params", "param", "reason"),
    [
        ({"logprobs": 4}, "logprobs", r"\(4\) is above .* max_logprobs \(3\)"),
        ({"prompt_logprobs": 4}, "prompt_logprobs", "above"),
        ({"logit_bias": {32: 1.0}}, "logit_bias", "32, outside"),
        ({"allowed_token_ids": [1, 99]}, "allowed_token_ids", "99, outside"),
        ({"stop_token_ids": [32]}, "stop_token_ids", "32, outside"),
        ({"bad_words": ["z"]}, "bad_words", "40, outside"),
    ],
)
def test_parameters_beyond_the_engines_limits_are_refused(params, param, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        make(letters()).process("r", [1], SamplingParams(**params))

    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [("a", {}, "prompt"), ([1], {"stop": "x"}, "stop"), ([1], {"bad_words": ["x"]}, "bad_words")],
)
def test_text_needs_a_tokenizer(prompt, params, param):
    with pytest.raises(InvalidRequest, match="needs a tokenizer") as caught:
        make(None).process("r", prompt, SamplingParams(**params))

    assert caught.value.param == param


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ({"request_id": ""}, "must have 1 to 256 characters, not 0"),
        ({"request_id": "x" * (MAX_LABEL + 1)}, "not 257"),
        ({"request_id": "\ud800"}, "surrogate"),
        ({"cache_salt": "x" * (MAX_LABEL + 1)}, "must have 0 to 256 characters"),
        ({"cache_salt": "\udfff"}, "surrogate"),
        ({"priority": 2**63}, "priority must be from"),
    ],
)
def test_an_invalid_id_salt_or_priority_is_refused(label, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        make().process(label.pop("request_id", "r"), [1], SamplingParams(), **label)

    assert str(caught.value).startswith(str(caught.value.param))


# -- pooling ----------------------------------------------------------------------------------


def pairs() -> Tokenizer:
    """Letters as in `letters`, between <s> and </s>; a second text's tokens are of type 1."""
    vocab = {char: i for i, char in enumerate("_abcdefghijklmnopqrstuvwxy")}
    rust = RustTokenizer(models.BPE(vocab, []))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    rust.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    ends = [(name, rust.token_to_id(name)) for name in ("<s>", "</s>")]
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=ends
    )
    return wrap(rust, {"bos_token": "<s>", "eos_token": "</s>"}, ChatTemplates({}))


def test_a_pooling_prompt_may_use_the_whole_context():
    processor = make(tasks=("embed",))
    params = PoolingParams(pooling="mean")

    [request] = processor.process_pooling("r", [5] * MAX_MODEL_LEN, params).requests

    assert request.pooling == params
    assert request.second_text_start is None
    with pytest.raises(
        RequestTooLarge, match=r"has 17 tokens; .* it may have at most 16: shorten it"
    ):
        processor.process_pooling("r", [5] * (MAX_MODEL_LEN + 1), params)


@pytest.mark.parametrize(("most", "expected"), [(5, [1, 2, 3]), (3, [1]), (2, [])])
def test_truncation_keeps_the_special_tokens(most: int, expected: list[int]):
    tokenizer = pairs()
    params = PoolingParams(truncate_prompt_tokens=most)

    processed = make(tokenizer, tasks=("embed",)).process_pooling("r", "abcdef", params)

    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert processed.prompt_token_ids == [ends[0], *expected, ends[1]]
    assert processed.requests[0].pooling == PoolingParams()  # already truncated


def test_truncating_to_minus_one_keeps_the_whole_context():
    params = PoolingParams(truncate_prompt_tokens=-1)

    processed = make(tasks=("embed",)).process_pooling("r", [5] * 100, params)

    assert len(processed.prompt_token_ids) == MAX_MODEL_LEN


def test_a_pair_of_texts_is_one_prompt_with_the_start_of_the_second():
    tokenizer = pairs()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    params = PoolingParams(task="score")

    processed = make(tokenizer, tasks=("score",)).process_pooling("r", TextPair("ab", "c"), params)

    [request] = processed.requests
    assert request.prompt_token_ids == [bos, 1, 2, eos, 3, eos]
    assert request.second_text_start == 4


@pytest.mark.parametrize(
    ("tasks", "prompt", "params", "message"),
    [
        (("generate",), [5], PoolingParams(), "does not embed text; it generates text: use /v1"),
        (("embed",), [5], PoolingParams(task="score"), "does not score pairs of texts"),
        (("score",), [5], PoolingParams(task="score"), 'task "score" needs a pair of texts'),
        (("embed",), TextPair("a", "b"), PoolingParams(), 'task "score" needs a pair of texts'),
        (("embed",), [5], PoolingParams(dimensions=7), r"dimensions \(7\) is above .* \(6\)"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_task_the_model_does_not_support_is_refused(
    tasks: tuple[str, ...], prompt: object, params: PoolingParams, message: str
):
    with pytest.raises(InvalidRequest, match=message):
        make(tasks=tasks).process_pooling("r", prompt, params)


def test_an_encoder_refuses_to_generate_text():
    with pytest.raises(InvalidRequest, match="does not generate text; it embeds text: use /v1/emb"):
        make(tasks=("embed",)).process("r", [5], SamplingParams())
