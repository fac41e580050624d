"""Tokenizers from folders and GGUF files, compared with the libraries that define them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from portalm.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequest,
    ModelNotFound,
    UnsupportedModel,
)
from portalm.text import load_tokenizer
from portalm.text.gguf_tokenizer import SPLITS, build_gguf_tokenizer
from portalm.text.spelling import byte_level_alphabet

TEXTS = [
    "",
    " ",
    "Hello, world! It's a test; they'll see, we've DON'T.",
    "  leading\n\n\n   runs \t\t of   whitespace \r\n end   ",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # done\n",
    "naïve café Straße ÆØÅ ñandú İstanbul ﬁ",
    "北京是中国的首都。日本語のテキスト、한국어 텍스트",
    "Привет мир، مرحبا بالعالم ، שלום",
    "👩‍👩‍👧‍👦 🎉🇫🇷 e\u0301 \u200b\u00a0\u2028 \ufeff",
    "a\x00b\x7f\x1b[0m",
    "x=3; y=(4+5)*6/7",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|x|>",
    "<repo_name>org/repo<file_sep>main.py",
]


# -- the default model ------------------------------------------------------------------------


@pytest.mark.model
def test_default_model_tokenizes_as_transformers_does(default_model):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(default_model.parent), gguf_file=default_model.name)
    ours = load_tokenizer(default_model)

    # TEXTS has no two digits in a row: transformers does not read the split rule from GGUF files
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert ours.render_chat(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.model
def test_default_model_has_a_token_for_each_digit(default_model):
    tokenizer = load_tokenizer(default_model)

    ids = tokenizer.encode("In 2024: 1234567890²")

    assert [tokenizer.id_to_text(i) for i in ids] == ["In", " ", *"2024", ":", " ", *"1234567890²"]


@pytest.mark.model
def test_special_tokens_of_the_default_model(default_model):
    tokenizer = load_tokenizer(default_model)

    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_token_id == tokenizer.token_to_id("<|im_start|>") == 1
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>") == 2
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.encode("<|im_end|>") == [2]


# -- folders ----------------------------------------------------------------------------------


def byte_level(*merges: tuple[str, str]) -> RustTokenizer:
    tokens = [*byte_level_alphabet(), *("".join(pair) for pair in merges)]
    rust = RustTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return rust


def make_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    rust = byte_level(("h", "e"), ("l", "l"), ("Ġ", "w"))
    rust.enable_truncation(max_length=4)
    rust.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"bos_token": "<s>", "eos_token": eos, **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folder_matches_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(make_folder(tmp_path))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))

    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def test_truncation_in_tokenizer_json_is_ignored(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path))

    assert len(tokenizer.encode("abcdefgh")) == 8


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_eos_token": True}])
def test_llama_tokenizers_honor_bos_and_eos_flags_of_the_config(tmp_path, flags):
    config = {"tokenizer_class": "LlamaTokenizer", **flags}
    tokenizer = load_tokenizer(make_folder(tmp_path, config))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    ids = tokenizer.encode("he")

    he = tokenizer.token_to_id("he")
    begin = [bos] if flags else []
    assert ids == [*begin, he, *([eos] if flags.get("add_eos_token") else [])]
    assert tokenizer.encode("he", add_special_tokens=False) == [he]


def test_tokens_listed_only_in_the_config_are_added(tmp_path):
    size = byte_level(("h", "e"), ("l", "l"), ("Ġ", "w")).get_vocab_size()
    listed = {"added_tokens_decoder": {str(size): {"content": "<end>", "special": True}}}

    tokenizer = load_tokenizer(make_folder(tmp_path, listed))

    assert tokenizer.encode("he<end>")[-1] == size
    assert tokenizer.decode([size]) == ""
    assert tokenizer.vocab_size == size + 1


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("tokens", [["ll"], {"image_token": "ll"}], ids=["list", "by name"])
def test_listed_special_tokens_are_special(tmp_path, key, tokens):
    tokenizer = load_tokenizer(make_folder(tmp_path, {key: tokens}))

    assert tokenizer.decode(tokenizer.encode("hello")) == "heo"


def test_token_with_a_role_is_special_even_if_not_marked_as_such(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path, {"pad_token": "ll"}))

    assert tokenizer.pad_token_id in tokenizer.special_ids
    assert tokenizer.decode([tokenizer.pad_token_id]) == ""


def test_chat_template_file_takes_precedence_over_the_config(tmp_path):
    folder = make_folder(tmp_path, {"chat_template": "config"})
    assert load_tokenizer(folder).chat_template == "config"

    (folder / "chat_template.jinja").write_text("file {{ bos_token }}")

    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "file <s>"


def test_chat_template_json_is_read(tmp_path):
    folder = make_folder(tmp_path, {"chat_template": "config"})
    file = folder / "chat_template.json"

    file.write_text(json.dumps({"chat_template": "json {{ bos_token }}"}))
    assert load_tokenizer(folder).chat_template == "json {{ bos_token }}"

    (folder / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(folder).chat_template == "jinja"
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"chat_template.json.*must contain a JSON object"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "start", "package"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("tekken.json", b"{}", "mistral-common"),
    ],
)
def test_a_tokenizer_file_without_its_package_names_the_package(
    tmp_path, monkeypatch, name, start, package
):
    (tmp_path / name).write_bytes(start)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(CheckpointError, match=f"{name}.*run `pip install {package}`"):
        load_tokenizer(tmp_path)


def test_given_template_replaces_the_models_template(tmp_path):
    folder = make_folder(tmp_path, {"chat_template": "config"})
    (tmp_path / "mine.jinja").write_text("mine")

    assert load_tokenizer(folder, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    by_path = load_tokenizer(folder, chat_template=str(tmp_path / "mine.jinja"))
    assert by_path.chat_template == "mine"


@pytest.mark.parametrize("template", ["no/such/file.jinja", "{% if %}"])
def test_invalid_template_is_rejected_when_loading(tmp_path, template):
    with pytest.raises(ConfigError, match="template"):
        load_tokenizer(make_folder(tmp_path), chat_template=template)


def test_folder_without_a_tokenizer_names_the_tokenizer_flag(tmp_path):
    with pytest.raises(ModelNotFound, match="--tokenizer"):
        load_tokenizer(tmp_path)


def test_invalid_files_are_named(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*not valid JSON"):
        load_tokenizer(folder)

    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*not a valid tokenizer"):
        load_tokenizer(folder)


def test_loading_a_folder_does_not_import_torch_or_transformers(tmp_path):
    code = (
        "import sys; from pathlib import Path; from portalm.text import load_tokenizer;"
        f"load_tokenizer(Path({str(make_folder(tmp_path))!r})).encode('he');"
        "print({'torch', 'transformers', 'jinja2'} & sys.modules.keys())"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert result.stdout.strip() == "set()"


# -- formats that only transformers reads -----------------------------------------------------


def test_folder_in_an_older_format_is_loaded_by_transformers(tmp_path):
    vocab = {token: i for i, token in enumerate([*byte_level_alphabet(), "he", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer.encode("hé") == [vocab["h"], vocab["Ã"], vocab["©"]]
    assert tokenizer.decode([vocab["he"], tokenizer.eos_token_id]) == "he"


def test_python_tokenizer_works_the_same(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path, chat_template="{{ messages[0].content }}{{ eos_token }}")
    ids = [byte + 3 for byte in "é!".encode()]

    assert tokenizer.encode("é!") == [*ids, tokenizer.eos_token_id]
    assert tokenizer.encode("é!", add_special_tokens=False) == ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "é!"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "é!"}]) == [*ids, 1]
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.feed, ids)) + stream.flush() == "é!"
    assert tokenizer.id_to_text(ids[-1]) == "!"


# -- tokens -----------------------------------------------------------------------------------


def test_lone_surrogate_is_rejected_with_its_position(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path))

    with pytest.raises(InvalidRequest, match=r"character 2 .*\\ud83d"):
        tokenizer.encode("ab\ud83d")


def test_unknown_ids_have_no_text(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path))

    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.decode([10**6, tokenizer.token_to_id("he")]) == "he"


def test_single_tokens_keep_their_spaces_and_bytes(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path))
    word, part = tokenizer.token_to_id("Ġw"), tokenizer.token_to_id("å")

    assert (tokenizer.id_to_token(word), tokenizer.id_to_text(word)) == ("Ġw", " w")
    assert (tokenizer.token_bytes(part), tokenizer.id_to_text(part)) == (b"\xe5", "\ufffd")


# -- GGUF -------------------------------------------------------------------------------------


def byte_level_metadata(**more: Any) -> dict[str, Any]:
    tokens = [*byte_level_alphabet(), "he", "<s>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    words = ["▁", "a", "b", "▁a", "ab", "▁ab"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *words],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.scores": [0.0] * 259 + [-3.0, -4.0, -5.0, -2.0, -1.0, -2.5],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


FILE = Path("model.gguf")


def pieces(metadata: dict[str, Any], text: str) -> list[str]:
    return list(build_gguf_tokenizer(FILE, metadata).encode(text).tokens)


@pytest.mark.parametrize(
    ("pre", "number"),
    [
        ("gpt-2", ["12345"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("default", ["123", "45"]),
    ],
)
def test_pre_tokenizers_split_numbers(pre, number):
    rust = build_gguf_tokenizer(FILE, byte_level_metadata(pre=pre))

    cut = [piece for piece, _ in rust.pre_tokenizer.pre_tokenize_str("12345")]

    assert cut == number


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-4o", ["Ab", "Cd", "EF'll", " go", " ", "123", "4", "東京x"]),
        ("deepseek-v3", ["AbCdEF", "'ll", " go", " ", "123", "4", "東京", "x"]),
        ("dbrx", ["AbCdEF", "'ll", " go", " ", "123", "4", "東京x"]),
    ],
)
def test_pre_tokenizers_split_words(pre, words):
    rust = build_gguf_tokenizer(FILE, byte_level_metadata(pre=pre))

    text = "AbCdEF'll go 1234東京x"
    cut = [text[slice(*place)] for _, place in rust.pre_tokenizer.pre_tokenize_str(text)]

    assert cut == words


@pytest.mark.parametrize("pre", SPLITS)
def test_every_pre_tokenizer_preserves_the_text(pre):
    rust = build_gguf_tokenizer(FILE, byte_level_metadata(pre=pre))

    for text in TEXTS:
        if text.isascii():  # form NFC changes other text on purpose
            assert rust.decode(rust.encode(text).ids, skip_special_tokens=False).endswith(text)


def test_unknown_pre_tokenizer_is_named():
    with pytest.raises(UnsupportedModel, match=r"'exotic' is not supported; supported: .*smollm"):
        build_gguf_tokenizer(FILE, byte_level_metadata(pre="exotic"))


def test_unknown_tokenizer_type_is_named():
    with pytest.raises(UnsupportedModel, match="'rwkv'"):
        build_gguf_tokenizer(FILE, byte_level_metadata(model="rwkv"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": []}, "missing or empty"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"merges": ["h zzz"]}, "cannot be built"),
        ({"bos_token_id": 9999, "add_bos_token": True}, "cannot be built"),
    ],
)
def test_inconsistent_vocabulary_is_rejected(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        build_gguf_tokenizer(FILE, byte_level_metadata(**changes))


def test_added_tokens_are_matched_in_text_and_only_control_tokens_are_special():
    rust = build_gguf_tokenizer(FILE, byte_level_metadata(pre="gpt-2"))

    ids = rust.encode("he<s><think>").ids

    assert ids == [256, 257, 258]
    assert rust.decode(ids, skip_special_tokens=True) == "he<think>"


@pytest.mark.parametrize(
    ("pre", "flags", "begins"),
    [
        ("gpt-2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_bos_is_added_if_the_file_or_the_pre_tokenizer_requires_it(pre, flags, begins):
    tokens = pieces(byte_level_metadata(pre=pre, **flags), "he")

    assert tokens == (["<s>", "he"] if begins else ["he"])


def test_sentencepiece_merges_the_pair_with_the_best_score_first():
    assert pieces(sentencepiece_metadata(), "ab") == ["<s>", "▁ab"]
    worse = [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0]
    metadata = sentencepiece_metadata(scores=[*worse, -2.5])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "ba"]

    assert pieces(metadata, "ab") == ["<s>", "▁a", "b"]


def test_sentencepiece_encodes_unknown_characters_as_bytes():
    rust = build_gguf_tokenizer(FILE, sentencepiece_metadata())

    encoding = rust.encode("aé")

    assert encoding.tokens == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert rust.decode(encoding.ids) == "aé"


def test_sentencepiece_without_a_space_prefix():
    metadata = sentencepiece_metadata(add_space_prefix=False)

    assert pieces(metadata, "ab ab") == ["<s>", "ab", "▁ab"]


def test_sentencepiece_needs_a_score_for_each_token():
    with pytest.raises(CheckpointError, match="scores"):
        build_gguf_tokenizer(FILE, sentencepiece_metadata(scores=[0.0]))
