"""A streamed completion: what the engine adds, as chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import CompletionOutput, Logprob
from portalm.sampling_params import SamplingParams
from portalm.server.protocol import CompletionRequest
from portalm.server.state import failure
from portalm.server.stream import usage
from portalm.server.text_logprobs import TextLogprobs, prompt_logprobs_object
from portalm.text.tokenizer import Tokenizer

AnswerT = TypeVar("AnswerT", AnswerDelta, CompletionOutput)


@dataclass(slots=True)
class _Answer:
    """One choice of the stream."""

    logprobs: TextLogprobs | None
    has_begun: bool = False


class CompletionStream:
    """Chunks of one HTTP request, in the order in which they may be sent."""

    def __init__(
        self,
        body: CompletionRequest,
        head: dict[str, Any],
        inputs: Sequence[ProcessedInput],
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        """For all prompts of a request.

        Args:
            body: what was asked.
            head: what every chunk begins with.
            inputs: the prompts, as the engine is asked.
            params: of each of them.
            tokenizer: the model's.
        """
        self._body = body
        self._head = head
        self._inputs = inputs
        self._params = params
        self._tokenizer = tokenizer
        self._answers: dict[tuple[int, int], _Answer] = {}
        self._needs_prompt_logprobs = params.prompt_logprobs is not None
        self._prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}
        """By prompt; they come with the first answer's first token."""
        self._held: dict[int, list[AnswerDelta]] = {}
        """By prompt whose logprobs are not known: what came of its other answers."""
        self._num_prompt = sum(len(one.prompt_token_ids) for one in inputs)
        self._num_generated = 0
        self._num_cached = 0

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that need no answer: the prompts, where they are echoed without logprobs."""
        if self._body.echo and not self._needs_prompt_logprobs:
            for i in range(len(self._inputs)):
                for index in range(self._params.n):
                    yield self._first(i, index)

    def chunks(self, i: int, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        """What `delta`, of prompt `i`, lets be sent. Raises the error that ended an answer."""
        if (error := failure(delta)) is not None:
            raise error
        if self._needs_prompt_logprobs and i not in self._prompt_logprobs:
            if delta.prompt_logprobs is None:
                self._held.setdefault(i, []).append(delta)
                return
            self._prompt_logprobs[i] = delta.prompt_logprobs
        for one in (delta, *self._held.pop(i, ())):
            yield from self._pieces(i, one)

    def closing(self) -> Iterator[dict[str, Any]]:
        """The chunk that has no choice but the usage, where it is asked for."""
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _pieces(self, i: int, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        delta = as_asked(self._body, delta)
        self._num_generated += len(delta.token_ids)
        if delta.final is not None:
            self._num_cached += delta.final.num_cached_tokens
        is_told = delta.text or delta.finish_reason is not None or delta.logprobs
        if not is_told and not (self._body.return_token_ids and delta.token_ids):
            return  # half a character, or what may begin a stop string
        answer = self._answer(i, delta.index)
        if not answer.has_begun and (self._body.echo or self._needs_prompt_logprobs):
            yield self._first(i, delta.index)
        choice = self._choice(i, delta.index)
        choice["text"] = delta.text
        choice["finish_reason"] = delta.finish_reason
        choice["stop_reason"] = delta.stop_reason
        if answer.logprobs is not None and delta.logprobs is not None:
            choice["logprobs"] = answer.logprobs.of(delta.token_ids, delta.logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if not answer.has_begun:
                choice["prompt_token_ids"] = self._inputs[i].prompt_token_ids
        answer.has_begun = True
        yield self._chunk(choice)

    def _first(self, i: int, index: int) -> dict[str, Any]:
        """The chunk that tells of the prompt: its text if it is echoed, its logprobs."""
        body, prompt_ids = self._body, self._inputs[i].prompt_token_ids
        prompt_logprobs = self._prompt_logprobs.get(i)
        choice = self._choice(i, index)
        if body.echo:
            choice["text"] = echoed(self._inputs[i], self._params, self._tokenizer)
            if body.logprobs is not None and prompt_logprobs is not None:
                shape = TextLogprobs(self._tokenizer, self._params, num_top=body.logprobs)
                choice["logprobs"] = shape.of(prompt_ids, prompt_logprobs)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_object(
                prompt_logprobs, body.prompt_logprobs
            )
        if body.return_token_ids:
            choice["token_ids"] = []
            choice["prompt_token_ids"] = prompt_ids
        self._answer(i, index).has_begun = True
        return self._chunk(choice)

    def _answer(self, i: int, index: int) -> _Answer:
        answer = self._answers.get((i, index))
        if answer is None:
            logprobs = answer_logprobs(self._body, self._inputs[i], self._params, self._tokenizer)
            answer = self._answers[i, index] = _Answer(logprobs)
        return answer

    def _choice(self, i: int, index: int) -> dict[str, Any]:
        return {
            "index": i * self._params.n + index,
            "text": "",
            "logprobs": None,
            "finish_reason": None,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": [choice]}
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._num_prompt, self._num_generated, self._num_cached)


def echoed(one: ProcessedInput, params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The prompt's text: as it was given, or of its tokens."""
    if one.prompt is not None:
        return one.prompt
    return tokenizer.decode(
        one.prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )


def answer_logprobs(
    body: CompletionRequest, one: ProcessedInput, params: SamplingParams, tokenizer: Tokenizer
) -> TextLogprobs | None:
    """Shapes the logprobs of an answer to `one`; None if none are asked for."""
    if body.logprobs is None:
        return None
    return TextLogprobs(
        tokenizer,
        params,
        num_top=body.logprobs,
        prompt_token_ids=one.prompt_token_ids,
        offset=len(echoed(one, params, tokenizer)) if body.echo else 0,
    )


def as_asked(body: CompletionRequest, answer: AnswerT) -> AnswerT:
    """`answer`, without the one token that an engine draws where none was asked for."""
    if not body.scores_only:
        return answer
    return replace(
        answer,
        text="",
        token_ids=[],
        logprobs=None if answer.logprobs is None else [],
        finish_reason="length",
        stop_reason=None,
    )
