"""Messages between a client, its grammar compiler and its engine: plain data for msgpack."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from portalm.sampling_params import StructuredOutputs


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary that a grammar is compiled for."""

    tokens: bytes
    """msgpack of a list[bytes]: the bytes that each token adds to a text, empty for tokens that
    are not text (special tokens, for example). The list may be shorter than `size`."""
    size: int
    """Number of columns of the model's logits."""
    eos_token_ids: list[int]
    """Tokens that end the answer, allowed wherever the grammar may end."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar compiled for one vocabulary."""

    key: str
    """Identifies the grammar: equal grammars have equal keys (`key_of`)."""
    data: bytes
    """The compiled grammar, serialized as JSON by XGrammar."""


class LoadGrammar(msgspec.Struct, tag=True, kw_only=True):
    """Message to an engine: load a grammar, before the first request that uses it."""

    key: str
    data: bytes
    """As in `CompiledGrammar`."""
    vocabulary: Vocabulary | None
    """The vocabulary, sent with the first grammar; None afterwards."""
    forget: list[str]
    """Keys of grammars to drop: no later request uses them."""


class Compile(msgspec.Struct, tag=True):
    """Message to a compiler process, answered by `Compiled` or `Refused`."""

    asked: StructuredOutputs


class Compiled(msgspec.Struct, tag=True):
    """The compiled grammar."""

    data: bytes
    """As in `CompiledGrammar`."""


class Refused(msgspec.Struct, tag=True):
    """The grammar cannot be compiled."""

    message: str
    """The reason, shown to the caller."""


def key_of(asked: StructuredOutputs) -> str:
    """Return a key that is equal for equal structured outputs (a SHA-256 hex digest)."""
    return hashlib.sha256(msgspec.msgpack.encode(asked)).hexdigest()
