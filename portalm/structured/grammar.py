"""The engine's side of grammars: loaded beside the steps, matched token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from portalm.structured.messages import LoadGrammar, Vocabulary

MASK_S = 0.002
"""What the host may compute for a token of one request, on average: all others wait meanwhile."""
_ONCE_S = 0.25
"""What it may compute for one request besides."""


class NoTokenFits(Exception):
    """Nothing can be drawn for a request any more, with the reason."""


class Grammar:
    """A grammar that is loaded, or is being loaded; requests share it."""

    def __init__(self, loading: Future[Any], eos_token_ids: Sequence[int]) -> None:
        self._loading = loading
        self.eos_token_ids = tuple(eos_token_ids)
        """Drawn where the grammar may end."""

    @property
    def is_loaded(self) -> bool:
        """True once `matcher` does not wait (or raises: loading failed)."""
        return self._loading.done()

    def wait(self, seconds: float) -> None:
        """Until it is loaded, but not longer."""
        wait([self._loading], timeout=seconds)

    def check(self) -> None:
        """Raise what loading raised."""
        self._loading.result()

    def matcher(self) -> Matcher:
        """One at the beginning of an answer."""
        return Matcher(self._loading.result())


class Matcher:
    """How far one answer has come in its grammar: a function of its tokens, and of nothing else."""

    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._num_tokens = 0
        self._seconds = 0.0

    def advance(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Go on to the end of `token_ids`: a prompt and the answer so far.

        Raises:
            NoTokenFits: the answer does not match, or matching takes too long.
        """
        started = time.thread_time()
        for token_id in token_ids[num_prompt_tokens + self._num_tokens :]:
            if not _guarded(self._matcher.accept_token, token_id):
                raise NoTokenFits(
                    f"token {self._num_tokens} of the answer (id {token_id}) does not match"
                )
            self._num_tokens += 1
        self._count(time.thread_time() - started)

    def fill(self, mask: npt.NDArray[np.int32], row: int) -> None:
        """Set the bits of the tokens that may come next in `mask[row]`, int32 [R, ceil(V / 32)]."""
        started = time.thread_time()
        _guarded(self._matcher.fill_next_token_bitmask, mask, row)
        self._count(time.thread_time() - started)

    def _count(self, seconds: float) -> None:
        self._seconds += seconds
        if self._seconds > _ONCE_S + MASK_S * (self._num_tokens + 1):
            raise NoTokenFits(
                f"to match {self._num_tokens} tokens took {self._seconds * 1000:.0f} ms, at most "
                f"{MASK_S * 1000:.0f} a token are given: the grammar is too ambiguous"
            )


def _guarded(call: Callable[..., bool], *args: object) -> bool:
    """`call`'s result; what XGrammar raises is the request's own."""
    try:
        return call(*args)
    except RuntimeError as error:
        raise NoTokenFits(str(error)) from error


class Grammars:
    """The grammars that an engine was given and not told to forget."""

    def __init__(self) -> None:
        self._grammars: dict[str, Grammar] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._vocabulary: Vocabulary | None = None
        self._info: Any = None
        """XGrammar's view of the vocabulary; of the loading thread."""

    def take(self, message: LoadGrammar) -> None:
        """Begin to load a grammar. XGrammar is imported with the first one, in a thread too."""
        for key in message.forget:
            self._grammars.pop(key, None)
        self._vocabulary = message.vocabulary or self._vocabulary
        assert self._vocabulary is not None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "grammars")
        loading = self._executor.submit(self._load, self._vocabulary, message.data)
        self._grammars[message.key] = Grammar(loading, self._vocabulary.eos_token_ids)

    def __getitem__(self, key: str) -> Grammar:
        return self._grammars[key]

    def _load(self, vocabulary: Vocabulary, data: bytes) -> Any:
        import xgrammar

        if self._info is None:
            self._info = tokenizer_info(vocabulary)
        return xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._info)

    def close(self) -> None:
        """End the loading thread."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def tokenizer_info(vocabulary: Vocabulary) -> Any:
    """XGrammar's view of a vocabulary."""
    import xgrammar

    tokens = msgspec.msgpack.decode(vocabulary.tokens, type=list[bytes])
    return xgrammar.TokenizerInfo(
        tokens,
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.size,
        stop_token_ids=vocabulary.eos_token_ids,
    )
