"""Tokenizers built from a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.loader.gguf import read_metadata
from portalm.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type."""

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def load_gguf_tokenizer(path: Path, chat_template: str | None) -> Tokenizer:
    """The tokenizer in a .gguf file.

    Raises:
        CheckpointError: its metadata is incomplete.
        UnsupportedModel: a kind of tokenizer that is not known.
    """
    metadata = read_metadata(path)
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        kind: str = metadata["tokenizer.ggml.model"]
        types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        if kind == "gpt2":
            encoder = _byte_level(path, metadata, tokens)
        elif kind == "llama":
            encoder = _sentence_piece(metadata, tokens, types)
        else:
            raise UnsupportedModel(
                f"{path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama"
            )
    except KeyError as error:
        raise CheckpointError(path, f"its metadata has no {error.args[0]!r}") from None

    special = [i for i, t in enumerate(types) if t in (_CONTROL, _UNKNOWN)]
    encoder.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in special]
    )
    encoder.add_tokens(
        [
            AddedToken(tokens[i], special=False, normalized=False)
            for i, t in enumerate(types)
            if t == _USER_DEFINED
        ]
    )
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    _add_begin_and_end(encoder, metadata, tokens, bos, eos)
    return Tokenizer(
        encoder=encoder,
        bos_token_id=bos,
        eos_token_id=eos,
        special_ids=frozenset(special),
        chat_template=chat_template or metadata.get("tokenizer.chat_template"),
        template_variables={
            name: tokens[i]
            for name, i in (("bos_token", bos), ("eos_token", eos))
            if i is not None and i < len(tokens)
        },
    )


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> FastTokenizer:
    """Byte-level BPE, as in GPT-2; the way text is split first differs from model to model."""
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    split = metadata.get("tokenizer.ggml.pre", "default")
    encoder = FastTokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=split == "llama-bpe",
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if split in ("default", "gpt-2"):
        encoder.pre_tokenizer = byte_level
    elif split in ("smollm", "starcoder", "refact", "codeshell"):
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    elif split in ("llama-bpe", "qwen2"):
        pattern = _LLAMA3_PATTERN if split == "llama-bpe" else _QWEN2_PATTERN
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), only_bytes]
        )
        if split == "qwen2":
            encoder.normalizer = normalizers.NFC()
    else:
        raise UnsupportedModel(
            f"{path}: tokenizer.ggml.pre {split!r} is not supported; supported: default, gpt-2, "
            f"smollm, starcoder, refact, codeshell, llama-bpe, qwen2"
        )
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _sentence_piece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> FastTokenizer:
    """SentencePiece BPE with byte fallback, as in Llama 2."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    encoder = FastTokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, metadata["tokenizer.ggml.scores"], types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = (
        [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    )
    encoder.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    encoder.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return encoder


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others; the result's score decides what is merged first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, i in vocab.items():
        if types[i] in (_CONTROL, _UNKNOWN, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right, (token[:cut], token[cut:])))
    return [pair for *_, pair in sorted(found)]


def _add_begin_and_end(
    encoder: FastTokenizer,
    metadata: dict[str, Any],
    tokens: list[str],
    bos: int | None,
    eos: int | None,
) -> None:
    """Put the beginning- and end-of-sequence tokens around texts, where the model wants them."""
    is_spm = metadata.get("tokenizer.ggml.model") == "llama"
    wants_bos = metadata.get("tokenizer.ggml.add_bos_token", is_spm) and bos is not None
    wants_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None
    if not wants_bos and not wants_eos:
        return
    around = []
    if wants_bos and bos is not None:
        around.append((tokens[bos], bos))
    pieces = [f"{token}:0" for token, _ in around] + ["$A:0"]
    if wants_eos and eos is not None:
        around.append((tokens[eos], eos))
        pieces.append(f"{tokens[eos]}:0")
    encoder.post_processor = processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=around
    )
