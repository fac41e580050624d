"""Grammars between a client and its engine: what to compile for, and what the engine has."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from portalm.engine.messages import EngineReady
from portalm.errors import InvalidRequest
from portalm.structured.messages import CompiledGrammar, LoadGrammar, Vocabulary
from portalm.text.tokenizer import Tokenizer

_MAX_LOADED_BYTES = 64 << 20
"""Compiled grammars that an engine keeps, as XGrammar's JSON; loaded they take less."""


def vocabulary_of(tokenizer: Tokenizer, ready: EngineReady) -> Vocabulary:
    """What an engine's grammars are compiled for.

    Raises:
        InvalidRequest: the tokens cannot be known as bytes, or nothing ends an answer.
    """
    tokens = tokenizer.vocabulary()
    if tokens is None:
        raise InvalidRequest(
            "structured_outputs is not possible with this model: its tokenizer does not tell the "
            "bytes of its tokens",
            param="structured_outputs",
        )
    eos = [token_id for token_id in ready.eos_token_ids if token_id < ready.vocab_size]
    if not eos:
        raise InvalidRequest(
            "structured_outputs is not possible with this model: it names no end-of-sequence token",
            param="structured_outputs",
        )
    return Vocabulary(msgspec.msgpack.encode(tokens[: ready.vocab_size]), ready.vocab_size, eos)


class LoadedGrammars:
    """What one engine was given, so that each grammar is sent once."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_bytes = 0
        self._knows_vocabulary = False

    def need(self, grammar: CompiledGrammar, vocabulary: Vocabulary) -> LoadGrammar | None:
        """What to send before a request with `grammar`; None: the engine has it."""
        if grammar.key in self._sizes:
            self._sizes.move_to_end(grammar.key)
            return None
        self._sizes[grammar.key] = len(grammar.data)
        self._num_bytes += len(grammar.data)
        forget = []
        while self._num_bytes > _MAX_LOADED_BYTES:
            key, size = self._sizes.popitem(last=False)
            self._num_bytes -= size
            forget.append(key)
        message = LoadGrammar(
            key=grammar.key,
            data=grammar.data,
            vocabulary=None if self._knows_vocabulary else vocabulary,
            forget=forget,
        )
        self._knows_vocabulary = True
        return message
