"""Who answers in `portalm chat`: a model in this process, or one behind a server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from portalm.errors import PortaLMError, RequestFailed

if TYPE_CHECKING:
    import httpx

    from portalm.llm import LLM

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer."""

    text: str
    num_tokens: int
    """Of the answer so far."""
    finish_reason: str | None = None


class Partner(Protocol):
    """One who answers."""

    name: str
    """The model, and where it runs."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """The next message, piece by piece; closing the iterator ends the request.

        Raises:
            PortaLMError: it cannot be answered; the text says why.
            KeyboardInterrupt: Ctrl-C, at a moment when it does no harm.
        """


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: LLM, *, max_tokens: int, temperature: float) -> None:
        """Answer with `llm`, which is loaded."""
        from portalm.sampling_params import SamplingParams

        self._llm = llm
        self._params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        ready = llm.engine.ready
        self.name = f"{ready.model} on {ready.device}"

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See `Partner`."""
        prompt = self._llm.get_tokenizer().apply_chat_template(list(messages))
        num_tokens = 0
        with _held_interrupt() as was_interrupted:
            for delta in self._llm.stream(prompt, self._params):
                if was_interrupted():
                    raise KeyboardInterrupt
                if delta.error is not None:
                    raise RequestFailed(delta.error)
                num_tokens += len(delta.token_ids)
                yield Piece(delta.text, num_tokens, delta.finish_reason)


@contextlib.contextmanager
def _held_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside a step would leave an engine half way: it only sets what is given."""
    is_interrupted = False

    def hold(number: int, frame: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class RemoteModel:
    """A model behind a server that speaks OpenAI's protocol."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        api_key: str | None,
        max_tokens: int,
        temperature: float,
    ) -> None:
        """Ask which models it has.

        Args:
            url: of the server, with or without its /v1.
            model: as the server calls it; None: its first.
            api_key: sent as a bearer token.
            max_tokens: of an answer.
            temperature: 0 is greedy.

        Raises:
            PortaLMError: it does not answer, or not so.
        """
        import httpx

        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=10.0),
        )
        with self._reaching():
            response = self._http.get("/v1/models")
            if response.status_code != 200:
                raise RequestFailed(_error_in(response))
            self._model = model or response.json()["data"][0]["id"]
        self._settings = {"max_tokens": max_tokens, "temperature": temperature}
        self.name = f"{self._model} at {self._url}"

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See `Partner`."""
        import json

        body = {
            "model": self._model,
            "messages": list(messages),
            **self._settings,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_tokens = 0
        with (
            self._reaching(),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise RequestFailed(_error_in(response))
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RequestFailed(str(chunk["error"].get("message")))
                piece = _piece(chunk, num_tokens)
                num_tokens = piece.num_tokens
                yield piece
        raise RequestFailed(f"{self._url} closed the connection in the middle of the answer")

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise PortaLMError(
                f"no answer from {self._url} as OpenAI's protocol has it: "
                f"{type(error).__name__}: {error}. Is it the right --url, and does it run?"
            ) from error


def _piece(chunk: Mapping[str, Any], num_tokens: int) -> Piece:
    """A chunk as a piece; where the server does not count, a piece of text is a token."""
    choice = chunk["choices"][0] if chunk["choices"] else {}
    text = choice.get("delta", {}).get("content") or ""
    usage = chunk.get("usage") or {}
    count = usage.get("completion_tokens", num_tokens + bool(text))
    return Piece(text, count, choice.get("finish_reason"))


def _error_in(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"the server answers {response.status_code}: {message}"
