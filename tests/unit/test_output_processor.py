"""An engine's tokens become the caller's text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from portalm.core.plan import TokenLogprobs
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.errors import InvalidRequest
from portalm.outputs import Logprob
from portalm.sampling_params import SamplingParams
from portalm.text.chat_template import ChatTemplates
from portalm.text.rust_tokenizer import wrap
from portalm.text.spelling import byte_level_alphabet

_ALPHABET = byte_level_alphabet()


def _make_tokenizer():
    """One token per byte, with its value as id; 256 is EOS."""
    by_byte = {byte: char for char, byte in _ALPHABET.items()}
    rust = RustTokenizer(models.BPE({by_byte[byte]: byte for byte in range(256)}, []))
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("</s>")])
    return wrap(rust, {"eos_token": "</s>"}, ChatTemplates({}))


TOKENIZER = _make_tokenizer()
EOS = 256


class Caller:
    """One request and the engine's outputs for it."""

    def __init__(self, *, tokenizer=TOKENIZER, prompt: str = "Q:", **params: Any) -> None:
        self.params = SamplingParams(**{"max_tokens": 1000, **params})
        self.outputs = OutputProcessor(tokenizer)
        ids = ["r"] if self.params.n == 1 else [f"r-{i}" for i in range(self.params.n)]
        prompt_ids = list(prompt.encode())
        self.processed = ProcessedInput(
            request_id="r",
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            requests=[
                AddRequest(request_id=i, prompt_token_ids=prompt_ids, params=self.params, seed=0)
                for i in ids
            ],
        )
        self.outputs.add(self.processed, self.params, arrival_time=5.0)
        self.aborts: list[str] = []

    def send(self, tokens: str | bytes | list[int] = "", *, id: str = "r", **fields: Any):
        """Process one output; return its delta, if any."""
        ids = list(tokens.encode()) if isinstance(tokens, str) else list(tokens)
        done = self.outputs.process([TokenOutput(request_id=id, token_ids=ids, **fields)])
        self.aborts += done.abort_ids
        assert len(done.deltas) <= 1
        return done.deltas[0] if done.deltas else None

    def answer(self, index: int = 0):
        return self.outputs.snapshot("r").outputs[index]


def shown(deltas: list[AnswerDelta | None]) -> str:
    return "".join(delta.text for delta in deltas if delta is not None)


# -- text -------------------------------------------------------------------------------------


def test_deltas_add_up_to_the_answer():
    caller = Caller()

    deltas = [caller.send("He"), caller.send("llo"), caller.send("!", finish_reason="length")]

    assert [delta.text for delta in deltas] == ["He", "llo", "!"]
    assert [delta.is_last for delta in deltas] == [False, False, True]
    answer = caller.answer()
    assert (answer.text, answer.token_ids) == ("Hello!", list(b"Hello!"))
    assert (answer.finish_reason, answer.stop_reason) == ("length", None)
    assert deltas[-1].final == caller.outputs.snapshot("r")


def test_a_character_is_shown_when_it_is_complete():
    caller = Caller()
    first, *rest = "é".encode()

    assert caller.send([first]).text == ""
    assert caller.send(rest).text == "é"


def test_an_incomplete_character_is_shown_at_the_end():
    assert Caller().send(b"a\xe5", finish_reason="length").text == "a\ufffd"


def test_without_detokenizing_there_are_only_ids():
    delta = Caller(detokenize=False).send("ab", finish_reason="length")

    assert (delta.text, delta.token_ids) == ("", [97, 98])


def test_without_a_tokenizer_there_are_only_ids():
    delta = Caller(tokenizer=None, logprobs=0).send(
        "a", logprobs=[TokenLogprobs(97, -1.0, 1, [])], finish_reason="length"
    )

    assert (delta.text, delta.token_ids) == ("", [97])
    assert delta.logprobs == [{97: Logprob(-1.0, 1, None)}]


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "stop_reason", "params", "text"),
    [
        (EOS, None, {}, "ab"),
        (EOS, None, {"skip_special_tokens": False}, "ab"),
        (EOS, None, {"skip_special_tokens": False, "include_stop_str_in_output": True}, "ab</s>"),
        (EOS, None, {"include_stop_str_in_output": True}, "ab"),
        (ord("c"), ord("c"), {}, "ab"),
        (ord("c"), ord("c"), {"include_stop_str_in_output": True}, "abc"),
    ],
)
def test_the_token_that_ends_an_answer_is_shown_only_on_request(last, stop_reason, params, text):
    caller = Caller(**params)
    caller.send("ab")

    caller.send([last], finish_reason="stop", stop_reason=stop_reason)

    answer = caller.answer()
    assert (answer.text, answer.token_ids) == (text, [97, 98, last])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop_reason)
    assert caller.aborts == []


def test_an_ignored_eos_is_an_ordinary_token():
    caller = Caller(ignore_eos=True, skip_special_tokens=False)

    assert caller.send([97, EOS, 98]).text == "a</s>b"


def test_an_error_ends_the_answer_with_its_reason():
    caller = Caller()

    delta = caller.send(finish_reason="error", error="NaN logits")

    assert (delta.finish_reason, delta.error, delta.final.error) == (
        "error",
        "NaN logits",
        "NaN logits",
    )


# -- stop strings -----------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_and_is_removed():
    caller = Caller(stop=["END"])

    deltas = [caller.send(char) for char in "some E"] + [caller.send("ND")]

    assert shown(deltas) == "some "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
    assert caller.aborts == ["r"]
    assert caller.outputs.is_finished("r")


def test_a_stop_string_is_kept_on_request():
    caller = Caller(stop=["END"], include_stop_str_in_output=True)

    assert caller.send("some END").text == "some END"


def test_tokens_after_a_stop_string_are_dropped():
    caller = Caller(stop=["b"], logprobs=0)
    logprobs = [TokenLogprobs(ord(c), -1.0, 1, []) for c in "abcd"]

    delta = caller.send("abcd", logprobs=logprobs)

    assert (delta.text, delta.token_ids, len(delta.logprobs)) == ("a", [97, 98], 2)
    assert caller.answer().cumulative_logprob == -2.0
    assert caller.send("efg", finish_reason="length") is None
    assert caller.answer().token_ids == [97, 98]


def test_a_stop_string_in_the_last_token_wins_over_the_length():
    caller = Caller(stop=["b"])

    delta = caller.send("ab", finish_reason="length")

    assert (delta.finish_reason, delta.stop_reason) == ("stop", "b")
    assert caller.aborts == []  # the engine has already ended it


def test_held_back_text_is_shown_when_the_answer_ends():
    caller = Caller(stop=["END"])

    assert caller.send("an EN").text == "an "
    assert caller.send("", finish_reason="length").text == "EN"


def test_stop_strings_count_only_after_min_tokens():
    caller = Caller(stop=["a"], min_tokens=3)

    deltas = [caller.send(char) for char in "aaaa"]

    assert shown(deltas) == "aaa"
    assert [delta.stop_reason for delta in deltas] == [None, None, None, "a"]


@given(
    st.text(alphabet="abé", max_size=20),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), min_size=1, max_size=2),
    st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_the_number_of_tokens_per_output_makes_no_difference(text, stops, sizes):
    def run(sizes: list[int]):
        caller, data = Caller(stop=stops), text.encode()
        for size in sizes:
            if data and not caller.outputs.is_finished("r"):
                caller.send(data[:size])
                data = data[size:]
        if not caller.outputs.is_finished("r"):
            caller.send("", finish_reason="length")
        return caller.answer()

    assert run(sizes) == run([1] * 60)


# -- logprobs ---------------------------------------------------------------------------------


def test_logprobs_list_the_sampled_token_first():
    caller = Caller(logprobs=2)
    entry = TokenLogprobs(ord("c"), -3.0, 9, [(ord("a"), -0.5), (0xC3, -1.0)])

    delta = caller.send("c", logprobs=[entry])

    assert delta.logprobs == [
        {
            ord("c"): Logprob(-3.0, 9, "c"),
            ord("a"): Logprob(-0.5, 1, "a"),
            0xC3: Logprob(-1.0, 2, "\ufffd"),
        }
    ]
    assert list(delta.logprobs[0]) == [ord("c"), ord("a"), 0xC3]
    assert caller.answer().cumulative_logprob == -3.0


def test_prompt_logprobs_arrive_in_parts_and_begin_with_none():
    caller = Caller(prompt="abc", prompt_logprobs=0)

    assert caller.send(prompt_logprobs=[TokenLogprobs(98, -1.0, 1, [])]) is None
    caller.send("x", prompt_logprobs=[TokenLogprobs(99, -2.0, 4, [])])

    assert caller.outputs.snapshot("r").prompt_logprobs == [
        None,
        {98: Logprob(-1.0, 1, "b")},
        {99: Logprob(-2.0, 4, "c")},
    ]


def test_logprobs_are_returned_only_on_request():
    caller = Caller()

    assert caller.send("a").logprobs is None
    assert caller.answer().logprobs is None
    assert caller.outputs.snapshot("r").prompt_logprobs is None


# -- requests ---------------------------------------------------------------------------------


def test_a_request_ends_with_its_last_answer():
    caller = Caller(n=2, stop=["x"])

    first = caller.send("ax", id="r-0")
    assert (first.request_id, first.index, first.is_last) == ("r", 0, False)
    assert not caller.outputs.is_finished("r")
    assert caller.outputs.engine_ids("r") == ["r-1"]

    second = caller.send("b", id="r-1", finish_reason="length")
    assert (second.index, second.is_last) == (1, True)
    assert [answer.text for answer in second.final.outputs] == ["a", "b"]
    assert caller.aborts == ["r-0"]


def test_aborting_ends_every_answer_and_shows_held_back_text():
    caller = Caller(n=2, stop=["END"])
    caller.send("a EN", id="r-0")
    caller.send("b", id="r-1", finish_reason="length")

    assert caller.outputs.abort("r") == ["r-0"]

    assert caller.outputs.is_finished("r")
    assert (caller.answer(0).text, caller.answer(0).finish_reason) == ("a EN", "abort")
    assert caller.answer(1).finish_reason == "length"
    assert caller.send("late", id="r-0") is None
    assert caller.outputs.abort("r") == []


def test_an_id_in_use_is_refused_until_it_is_released():
    caller = Caller()
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        caller.outputs.add(caller.processed, caller.params, arrival_time=0.0)

    caller.outputs.forget("r")
    caller.outputs.add(caller.processed, caller.params, arrival_time=0.0)

    assert not caller.outputs.is_finished("r")


def test_outputs_of_unknown_requests_are_ignored():
    caller = Caller()

    assert caller.send("a", id="other") is None
    assert caller.outputs.is_finished("other")
    assert caller.outputs.engine_ids("other") == caller.outputs.abort("other") == []
    caller.outputs.forget("other")


def test_a_snapshot_does_not_change_with_later_outputs():
    caller = Caller(logprobs=0, prompt_logprobs=0)
    entry = TokenLogprobs(97, -1.0, 1, [])
    caller.send("a", logprobs=[entry], prompt_logprobs=[entry])
    before = caller.outputs.snapshot("r")

    caller.send("a", logprobs=[entry], prompt_logprobs=[entry], finish_reason="length")

    assert (before.outputs[0].text, before.outputs[0].token_ids, before.finished) == (
        "a",
        [97],
        False,
    )
    assert len(before.outputs[0].logprobs) == 1
    assert len(before.prompt_logprobs) == 2
    assert before.metrics.finished_time is None


def test_times_in_metrics_are_in_order():
    caller = Caller()
    caller.send("", num_cached_tokens=16)
    assert caller.outputs.snapshot("r").metrics.first_token_time is None
    caller.send("a")
    caller.send("b", finish_reason="length")

    output = caller.outputs.snapshot("r")

    times = output.metrics
    assert times.arrival_time == 5.0 < times.first_token_time <= times.finished_time
    assert (output.num_cached_tokens, output.finished) == (16, True)
