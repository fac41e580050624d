"""Grammars in the engine: loaded in a thread while steps run, matched token by token."""

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
"""Maximum CPU time per token of one request, on average: all other requests wait meanwhile."""
_ONCE_S = 0.25
"""CPU time that one request may use in addition to `MASK_S` per token."""


class NoTokenFits(Exception):
    """No further token can be sampled for a request; the message is the reason."""


class Grammar:
    """A grammar that is loaded or being loaded, shared by the requests that use it."""

    def __init__(self, loading: Future[Any], eos_token_ids: Sequence[int]) -> None:
        self._loading = loading
        self.eos_token_ids = tuple(eos_token_ids)
        """Tokens allowed wherever the grammar may end."""

    @property
    def is_loaded(self) -> bool:
        """Whether loading has finished or failed, so that `matcher` and `check` do not block."""
        return self._loading.done()

    def wait(self, seconds: float) -> None:
        """Block until it is loaded, at most `seconds`."""
        wait([self._loading], timeout=seconds)

    def check(self) -> None:
        """Raise the exception that loading raised, if it failed."""
        self._loading.result()

    def matcher(self) -> Matcher:
        """Return a matcher at the beginning of an answer."""
        return Matcher(self._loading.result())


class Matcher:
    """Position of one answer in its grammar, determined by the answer's tokens alone."""

    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._num_tokens = 0
        self._seconds = 0.0

    def advance(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Match the answer's tokens that were not matched yet.

        Args:
            token_ids: the prompt and the answer so far.
            num_prompt_tokens: length of the prompt in `token_ids`.

        Raises:
            NoTokenFits: the answer does not match, or matching takes too long.
        """
        started = time.thread_time()
        for token_id in token_ids[num_prompt_tokens + self._num_tokens :]:
            if not _guarded(self._matcher.accept_token, token_id):
                raise NoTokenFits(
                    f"token {self._num_tokens} of the answer (id {token_id}) does not match the "
                    f"grammar"
                )
            self._num_tokens += 1
        self._count(time.thread_time() - started)

    def fill(self, mask: npt.NDArray[np.int32], row: int) -> None:
        """Write the bits of the tokens that may come next to `mask[row]`.

        Args:
            mask: int32 [R, ceil(V / 32)], one bit per token of the vocabulary.
            row: the row to write.

        Raises:
            NoTokenFits: computing the mask takes too long, or fails.
        """
        started = time.thread_time()
        _guarded(self._matcher.fill_next_token_bitmask, mask, row)
        self._count(time.thread_time() - started)

    def _count(self, seconds: float) -> None:
        self._seconds += seconds
        if self._seconds > _ONCE_S + MASK_S * (self._num_tokens + 1):
            raise NoTokenFits(
                f"the grammar is too ambiguous: matching {self._num_tokens} tokens took "
                f"{self._seconds * 1000:.0f} ms; the limit is {MASK_S * 1000:.0f} ms per token"
            )


def _guarded(call: Callable[..., bool], *args: object) -> bool:
    """Return `call(*args)`; XGrammar's errors become `NoTokenFits`, which fails one request."""
    try:
        return call(*args)
    except RuntimeError as error:
        raise NoTokenFits(str(error)) from error


class Grammars:
    """The grammars of an engine, by key."""

    def __init__(self) -> None:
        self._grammars: dict[str, Grammar] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._vocabulary: Vocabulary | None = None
        self._info: Any = None
        """XGrammar's TokenizerInfo, used by the loading thread only."""

    def load(self, message: LoadGrammar) -> None:
        """Start loading a grammar in a thread, which imports XGrammar for the first one."""
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
        """Stop the loading thread."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def tokenizer_info(vocabulary: Vocabulary) -> Any:
    """Convert a vocabulary to XGrammar's TokenizerInfo."""
    import xgrammar

    tokens = msgspec.msgpack.decode(vocabulary.tokens, type=list[bytes])
    return xgrammar.TokenizerInfo(
        tokens,
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.size,
        stop_token_ids=vocabulary.eos_token_ids,
    )
