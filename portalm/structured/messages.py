"""What crosses between a client, its grammar compiler and its engine: plain data, msgpack."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from portalm.sampling_params import StructuredOutputs


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a grammar is compiled for."""

    tokens: bytes
    """msgpack of a list: the bytes that each token adds to a text, none for those that are no
    text (special tokens, for example). May be shorter than `size`."""
    size: int
    """Columns of the model's logits."""
    eos_token_ids: list[int]
    """End the answer; drawn where the grammar may end."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar for one vocabulary, as an engine takes it."""

    key: str
    """Of the same grammar the same."""
    data: bytes
    """XGrammar's own JSON."""


class LoadGrammar(msgspec.Struct, tag=True, kw_only=True):
    """To an engine: requests with this grammar will come."""

    key: str
    data: bytes
    """As in `CompiledGrammar`."""
    vocabulary: Vocabulary | None
    """With the first grammar; None: as before."""
    forget: list[str]
    """Keys that no request will name any more."""


class Compile(msgspec.Struct, tag=True):
    """Compile this; `Compiled` or `Refused` comes back."""

    asked: StructuredOutputs


class Compiled(msgspec.Struct, tag=True):
    """The result, as XGrammar's JSON."""

    data: bytes


class Refused(msgspec.Struct, tag=True):
    """It cannot be compiled; the text is for whoever asked."""

    message: str


def key_of(asked: StructuredOutputs) -> str:
    """A name for what was asked: the same for the same."""
    return hashlib.sha256(msgspec.msgpack.encode(asked)).hexdigest()
