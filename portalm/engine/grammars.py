"""Grammars between a client and its engine: the vocabulary, and which grammars the engine has."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from portalm.engine.messages import EngineReady
from portalm.errors import InvalidRequest
from portalm.structured.messages import CompiledGrammar, LoadGrammar, Vocabulary
from portalm.text.tokenizer import Tokenizer

_MAX_LOADED_BYTES = 64 << 20
"""Limit of the compiled grammars an engine keeps, in bytes of XGrammar's JSON."""


def vocabulary_of(tokenizer: Tokenizer, ready: EngineReady) -> Vocabulary:
    """The vocabulary to compile an engine's grammars for.

    Raises:
        InvalidRequest: the bytes of the tokens are unknown, or there is no end-of-sequence token.
    """
    tokens = tokenizer.vocabulary()
    if tokens is None:
        raise InvalidRequest(
            "structured_outputs is not supported with this model: its tokenizer does not provide "
            "the bytes of its tokens",
            param="structured_outputs",
        )
    eos = [token_id for token_id in ready.eos_token_ids if token_id < ready.vocab_size]
    if not eos:
        raise InvalidRequest(
            "structured_outputs is not supported with this model: it has no end-of-sequence token",
            param="structured_outputs",
        )
    return Vocabulary(msgspec.msgpack.encode(tokens[: ready.vocab_size]), ready.vocab_size, eos)


class LoadedGrammars:
    """Grammars that one engine has, so that each is sent once."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_bytes = 0
        self._has_vocabulary = False

    def need(self, grammar: CompiledGrammar, vocabulary: Vocabulary) -> LoadGrammar | None:
        """Return the message to send before a request with `grammar`; None if the engine has it."""
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
            vocabulary=None if self._has_vocabulary else vocabulary,
            forget=forget,
        )
        self._has_vocabulary = True
        return message
