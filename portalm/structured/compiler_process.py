"""Compile grammars in a separate process: `python -m portalm.structured.compiler_process FD`.

A grammar may take minutes and gigabytes to compile, or overflow the stack. Here that costs only
this process: the client (compiler.py) kills it after a timeout and starts another. The process has
a memory limit and a low priority.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from portalm.sampling_params import StructuredOutputs
from portalm.structured.grammar import MASK_S, tokenizer_info
from portalm.structured.messages import Compile, Compiled, Refused, Vocabulary

MAX_COMPILED_BYTES = 16 << 20
"""Maximum size of a compiled grammar, as XGrammar's JSON."""

_MAX_MEMORY_BYTES = 3 << 30
_NICENESS = 5

_TRIAL_TOKENS = 48
_TRIAL_ONCE_S = 0.02
"""CPU time that the trial may use in addition to `MASK_S` per token."""

_PREFIX = re.compile(r"\[[\d:]+\] \S+:\d+: (?:Warning: )?")
"""Prefix of XGrammar's messages: time, source file, line."""

_CHECK = re.compile(r"Check failed: \([^)]*\) is false: ")

_WHITESPACE = re.compile(r"\[((?: |\\n|\\r|\\t)+)\](\*|\{0,(\d{1,2})\})")

_MAX_WHITESPACE = 16
_ANY_JSON_OBJECT = '{"type": "object", "additionalProperties": true}'


class _NotPossible(Exception):
    """The grammar cannot be compiled; the message is the reason."""


class _Compiler:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._size = vocabulary.size
        self._eos = frozenset(vocabulary.eos_token_ids)
        self._compiler = xgrammar.GrammarCompiler(
            tokenizer_info(vocabulary), max_threads=1, cache_enabled=False
        )

    def compile(self, asked: StructuredOutputs) -> bytes:
        """Compile a grammar to XGrammar's JSON.

        Raises:
            _NotPossible: it cannot be compiled, is too large, or fails the trial.
        """
        with _messages_of_xgrammar() as messages:
            try:
                compiled = self._compile(asked)
            except RuntimeError as error:
                raise _NotPossible(_plain(str(error))) from error
            except MemoryError:
                raise _NotPossible("compiling takes too much memory") from None
        if messages:
            raise _NotPossible("; ".join(messages))
        self._trial(compiled)
        data: str = compiled.serialize_json()
        if len(data) > MAX_COMPILED_BYTES:
            raise _NotPossible(
                f"the compiled grammar has {len(data) >> 20} MiB; the limit is "
                f"{MAX_COMPILED_BYTES >> 20} MiB; use fewer repetitions or optional parts"
            )
        return data.encode()

    def _compile(self, asked: StructuredOutputs) -> Any:
        compiler = self._compiler
        if asked.regex is not None:
            return compiler.compile_regex(asked.regex)
        if asked.grammar is not None:
            return compiler.compile_grammar(asked.grammar)
        if asked.choice is not None:
            return compiler.compile_grammar(_choice_grammar(asked.choice))
        schema = _ANY_JSON_OBJECT if asked.json is None else asked.json
        assert isinstance(schema, str)  # StructuredOutputs converts it
        return compiler.compile_json_schema(
            schema,
            strict_mode=not asked.additional_properties,
            **_whitespace(asked.whitespace_pattern),
        )

    def _trial(self, compiled: Any) -> None:
        """Sample a few tokens at random, to reject unusable grammars before they reach an engine.

        Raises:
            _NotPossible: no text matches the grammar, or its masks take too long to compute.
        """
        matcher = self._xgrammar.GrammarMatcher(compiled)
        mask = np.zeros((1, -(-self._size // 32)), np.int32)
        generator = random.Random(0)
        started = time.thread_time()
        for i in range(_TRIAL_TOKENS):
            matcher.fill_next_token_bitmask(mask, 0)
            seconds = time.thread_time() - started
            if seconds > _TRIAL_ONCE_S + MASK_S * (i + 1):
                raise _NotPossible(
                    f"the grammar is too ambiguous: finding the tokens that may come next takes "
                    f"{seconds / (i + 1) * 1000:.0f} ms; the limit is {MASK_S * 1000:.0f} ms"
                )
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[: self._size])
            if not len(allowed):
                raise _NotPossible(
                    "the grammar matches no text"
                    if i == 0
                    else "the grammar has a dead end: no token can follow"
                )
            token = int(allowed[generator.randrange(len(allowed))])
            if token in self._eos:
                return
            matcher.accept_token(token)


def _choice_grammar(choices: tuple[str, ...]) -> str:
    return "root ::= " + " | ".join(f'"{_escaped(text)}"' for text in choices)


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() else _code(char) for char in text)


def _code(char: str) -> str:
    return f"\\U{ord(char):08x}" if ord(char) > 0xFFFF else f"\\u{ord(char):04x}"


def _whitespace(pattern: str | None) -> dict[str, Any]:
    """XGrammar's settings for a whitespace pattern; raises `_NotPossible` if it has none."""
    if pattern is None:  # none by default: models may write whitespace without end
        return {"any_whitespace": False}
    if pattern == "":
        return {"any_whitespace": False, "separators": (",", ":")}
    match = _WHITESPACE.fullmatch(pattern.replace("\n", "\\n").replace("\t", "\\t"))
    if match and set(re.findall(r"\\?.", match[1])) == {" ", r"\n", r"\r", r"\t"}:
        if match[2] == "*":
            return {}
        if 1 <= int(match[3]) <= _MAX_WHITESPACE:
            return {"max_whitespace_cnt": int(match[3])}
    raise _NotPossible(
        f"whitespace_pattern {pattern!r} is not supported; supported: '' (no whitespace), "
        r"'[ \n\r\t]*' and '[ \n\r\t]{0,N}' with N from 1 to "
        f"{_MAX_WHITESPACE}"
    )


# -- XGrammar's messages ----------------------------------------------------------------------


@contextlib.contextmanager
def _messages_of_xgrammar() -> Iterator[list[str]]:
    """Collect what XGrammar writes to stderr: it warns about everything that it ignores."""
    messages: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
            messages.extend(dict.fromkeys(_plain(line) for line in lines if line.strip()))


def _plain(text: str) -> str:
    """Remove the location in XGrammar's sources from a message, and limit its length."""
    text = _CHECK.sub("", _PREFIX.sub("", text)).strip()
    return text if len(text) <= 500 else text[:500] + "..."


# -- process ----------------------------------------------------------------------------------


def main() -> int:
    """Compile grammars for the client at the other end of a socket until it disconnects."""
    connection = Connection(int(sys.argv[1]))
    os.nice(_NICENESS)
    decoder = msgspec.msgpack.Decoder(Compile)
    compiler = _Compiler(msgspec.msgpack.decode(connection.recv_bytes(), type=Vocabulary))
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError):
        while True:
            answer: Compiled | Refused
            try:
                answer = Compiled(compiler.compile(decoder.decode(connection.recv_bytes()).asked))
            except _NotPossible as error:
                answer = Refused(str(error))
            connection.send_bytes(msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
