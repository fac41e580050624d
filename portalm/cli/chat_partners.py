"""Models for `portalm chat`: one in this process, or one on a server."""

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
    """A piece of an answer."""

    text: str
    num_tokens: int
    """Tokens of the answer so far."""
    finish_reason: str | None = None


class Partner(Protocol):
    """A model that answers."""

    name: str
    """Name of the model and where it runs."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """Yield the next message piece by piece; closing the iterator aborts the request.

        Raises:
            PortaLMError: the answer failed.
            KeyboardInterrupt: after Ctrl-C, between two steps.
        """


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: LLM, *, max_tokens: int, temperature: float) -> None:
        """Answer with a loaded `llm`."""
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
    """Delay Ctrl-C, which would interrupt the engine in a step; yield whether it was pressed."""
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
    """A model on an OpenAI-compatible server."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        api_key: str | None,
        max_tokens: int,
        temperature: float,
    ) -> None:
        """Connect, and look up the server's models.

        Args:
            url: base URL of the server, with or without /v1.
            model: name of the model; None: the server's first.
            api_key: sent as a bearer token.
            max_tokens: maximum tokens per answer.
            temperature: 0 is greedy.

        Raises:
            PortaLMError: the server does not answer, or not with a list of models.
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
        raise RequestFailed(f"{self._url} closed the connection before the end of the answer")

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise PortaLMError(
                f"no valid answer from {self._url} ({type(error).__name__}: {error}): check that "
                f"--url is right and that an OpenAI-compatible server runs there"
            ) from error


def _piece(chunk: Mapping[str, Any], num_tokens: int) -> Piece:
    """Convert a chunk; if the server reports no usage, each text chunk counts as one token."""
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
    return f"the server returned status {response.status_code}: {message}"
