"""Incremental detokenization compared with decoding all at once."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from portalm.text.chat_template import ChatTemplates
from portalm.text.rust_tokenizer import wrap
from portalm.text.spelling import byte_level_alphabet
from portalm.text.tokenizer import Tokenizer

WORDS = ["▁the", "▁caf", "é", "▁", "▁▁", "s", "北", "▁北京", "\ufffd"]


def byte_level() -> RustTokenizer:
    """A tokenizer of every byte and some words: `é` and `北` can be one token or several."""
    tokens = [*byte_level_alphabet(), "Ġthe", "Ã©", "åĮ"]
    rust = RustTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return rust


def sentencepiece() -> RustTokenizer:
    """A tokenizer of words with "▁" for the space, and of every byte."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    rust = RustTokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return rust


def metaspace() -> RustTokenizer:
    rust = RustTokenizer(models.BPE({token: i for i, token in enumerate(WORDS)}, []))
    rust.decoder = decoders.Metaspace()
    return rust


def word_pieces() -> RustTokenizer:
    """A tokenizer whose decoder has no known spelling."""
    tokens = ["[UNK]", "the", "cat", "##s", ".", "北", "\ufffd"]
    rust = RustTokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    rust.decoder = decoders.WordPiece(cleanup=False)
    return rust


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "word pieces": word_pieces,
}


@lru_cache
def make(kind: str) -> Tokenizer:
    rust = KINDS[kind]()
    rust.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    rust.add_tokens([AddedToken("<tool>", special=False)])
    return wrap(rust, {}, ChatTemplates({}))


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool) -> list[str]:
    stream = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
    return [*(stream.feed(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(st.data(), st.booleans())
def test_concatenated_pieces_equal_the_decoded_text(kind, data, skip):
    tokenizer = make(kind)
    ids = data.draw(ids_of(tokenizer))

    pieces = stream(tokenizer, ids, [], skip)

    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
@given(st.data(), st.booleans())
def test_answer_continues_the_text_of_the_prompt(kind, data, skip):
    tokenizer = make(kind)
    prompt, ids = data.draw(ids_of(tokenizer)), data.draw(ids_of(tokenizer))
    from_start = tokenizer.detokenizer(skip_special_tokens=skip)
    before = "".join(map(from_start.feed, prompt))  # without an incomplete last character

    answer = "".join(stream(tokenizer, ids, prompt, skip))

    assert before + answer == tokenizer.decode(prompt + ids, skip_special_tokens=skip)


def test_answer_to_a_prompt_without_text_starts_a_text():
    tokenizer = make("metaspace")
    unknown = tokenizer.vocab_size

    assert stream(tokenizer, [0], [unknown], True) == ["the", ""]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(st.text(max_size=20))
@example("👩‍👩‍👧 naïve 北京")
def test_pieces_are_whole_characters(kind, text):
    tokenizer = make(kind)
    ids_by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [ids_by_byte[bytes([byte])] for byte in text.encode()]

    pieces = stream(tokenizer, ids, [ids_by_byte[b"A"]], False)

    assert [piece for piece in pieces if piece] == list(text)


@given(st.data())
def test_byte_level_decoding_matches_the_library(data):
    rust, tokenizer = byte_level(), make("byte-level")
    ids = data.draw(st.lists(st.integers(0, 259), max_size=40))

    assert tokenizer.decode(ids) == rust.decode(ids)


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), max_size=12))
def test_sentencepiece_decoding_of_valid_utf8_matches_the_library(words):
    rust, tokenizer = sentencepiece(), make("sentencepiece")
    ids: list[int] = []
    for word in words:
        ids += [256 + WORDS.index(word)] if word in WORDS else list(word.encode())

    assert tokenizer.decode(ids) == rust.decode(ids)


def test_invalid_character_becomes_one_replacement_character():
    tokenizer = make("sentencepiece")

    pieces = stream(tokenizer, [0xE5, 0x8C, 0x41, 0xE5], [], True)

    assert pieces == ["", "", "\ufffdA", "", "\ufffd"]


def test_the_first_word_of_an_answer_keeps_its_space():
    tokenizer = make("sentencepiece")
    the = 256 + WORDS.index("▁the")

    assert stream(tokenizer, [the], [], True) == ["the", ""]
    assert stream(tokenizer, [the], [the], True) == [" the", ""]
    many_special = [tokenizer.token_to_id("<s>")] * 20
    assert stream(tokenizer, [the], many_special, True) == ["the", ""]
    assert stream(tokenizer, [the], [the, *many_special], True) == [" the", ""]


def test_character_split_between_prompt_and_answer_is_in_the_answer():
    tokenizer = make("sentencepiece")

    assert stream(tokenizer, [0x8C, 0x97], [0x41, 0xE5], True) == ["", "北", ""]


def test_special_tokens_are_shown_only_when_asked_for():
    tokenizer = make("byte-level")
    begin, tool = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<tool>")

    assert stream(tokenizer, [begin, tool], [], True) == ["", "<tool>", ""]
    assert stream(tokenizer, [begin, tool], [], False) == ["<s>", "<tool>", ""]


def test_spaces_between_special_tokens_can_be_left_out():
    tokenizer = make("word pieces")
    ids = [tokenizer.token_to_id(t) for t in ("the", "<s>", "</s>", "cat")]

    assert tokenizer.decode(ids, skip_special_tokens=False) == "the <s> </s> cat"
    assert (
        tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
        == "the <s></s> cat"
    )


def test_text_that_stays_invalid_is_emitted_in_the_end():
    tokenizer = make("word pieces")
    broken = tokenizer.token_to_id("\ufffd")

    pieces = stream(tokenizer, [broken] * 40, [], True)

    assert any(pieces[:20])
    assert "".join(pieces).count("\ufffd") == 40
