"""Build a tokenizer from the metadata of a GGUF file.

GGUF stores the vocabulary, merges (or scores) and token types, but only the name of the rule that
splits a text into words before merging (`tokenizer.ggml.pre`). The rules here are those in the
tokenizer.json files of the models with that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.loader.gguf_file import read_metadata
from portalm.text.chat_template import ChatTemplates
from portalm.text.rust_tokenizer import set_bos_and_eos, wrap
from portalm.text.tokenizer import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DIGITS_ALONE = (r"\p{N}", _GPT2)

SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone"), _DIGITS_ALONE),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "deepseek-v3": _DEEPSEEK_V3,
}
"""Regular expressions of each pre-tokenizer, applied in order, each to the pieces so far."""

_NFC = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2"})
"""Pre-tokenizers of models that normalize text to Unicode form NFC first."""

_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Pre-tokenizers of vocabularies that use a whole word if it is a token, ignoring merges."""

_BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""Pre-tokenizers of models that add BOS if the file does not set add_bos_token."""


_TEMPLATE = "tokenizer.chat_template"


def load_gguf_tokenizer(path: Path, chosen: ChatTemplates | None) -> Tokenizer:
    """Load the tokenizer in a .gguf file, with the `chosen` chat templates or the file's own."""
    metadata = read_metadata(path)
    rust = build_gguf_tokenizer(path, metadata)
    templates = {
        key[len(_TEMPLATE) + 1 :] or "default": text
        for key, text in metadata.items()
        if (key == _TEMPLATE or key.startswith(_TEMPLATE + ".")) and isinstance(text, str)
    }
    roles = {
        f"{role}_token": rust.id_to_token(token_id)
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (token_id := _role_id(metadata, name)) is not None
    }
    return wrap(rust, roles, chosen or ChatTemplates(templates))


def _role_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Id of the token with a role; SentencePiece defaults are unknown 0, BOS 1, EOS 2."""
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    usual = {"unknown": 0, "bos": 1, "eos": 2} if is_llama else {}
    token_id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
    return token_id


def build_gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> RustTokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        UnsupportedModel: the type of tokenizer or the pre-tokenizer is not supported.
        CheckpointError: the metadata is incomplete or contradictory.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{path.name}: tokenizer type {kind!r} is not supported in GGUF files (supported: "
            f"gpt2, llama); use --tokenizer with a folder that has a tokenizer.json"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(path, "tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(path, "tokenizer.ggml.tokens contains the same token twice")
    try:
        build = _build_byte_level if kind == "gpt2" else _build_sentencepiece
        tokenizer = build(path, metadata, tokens)
        _add_special_tokens(tokenizer, metadata, tokens)
        _add_bos_and_eos(tokenizer, metadata, tokens)
    except (UnsupportedModel, CheckpointError):
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(path, f"its tokenizer cannot be built: {error}") from error
    return tokenizer


def _build_byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> RustTokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UnsupportedModel(
            f"{path.name}: pre-tokenizer {pre!r} is not supported; supported: "
            f"{', '.join(sorted(SPLITS))}. "
            f"Use --tokenizer with a folder that has the model's tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    model = BPE(_ids(tokens), merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    tokenizer = RustTokenizer(model)
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(
    path: Path, metadata: Mapping[str, Any], tokens: list[str]
) -> RustTokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(path, "tokenizer.ggml.scores must have one entry per token")
    unknown = tokens[_role_id(metadata, "unknown") or 0]
    model = BPE(
        _ids(tokens),
        _merges_from_scores(tokens, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = RustTokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    marks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), marks]) if has_prefix else marks
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Merges in order: pairs that form the token with the highest score come first."""
    ids = _ids(tokens)
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _add_special_tokens(
    tokenizer: RustTokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
    """Add control and user-defined tokens, which are matched in a text before splitting it."""
    special, plain = [], []
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_bos_and_eos(
    tokenizer: RustTokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    by_default = is_llama or metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT
    bos, eos = _role_id(metadata, "bos"), _role_id(metadata, "eos")
    begins = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    set_bos_and_eos(
        tokenizer,
        bos=tokens[bos] if begins and bos is not None else None,
        eos=tokens[eos] if ends and eos is not None else None,
    )
