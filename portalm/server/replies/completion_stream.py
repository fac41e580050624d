"""Chunks of a streamed completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import Logprob
from portalm.server.replies.completion_choice import ChoiceShape
from portalm.server.replies.stream import usage
from portalm.server.replies.text_logprobs import TextLogprobs
from portalm.server.state import failure


@dataclass(slots=True)
class _Answer:
    """State of one choice of the stream."""

    logprobs: TextLogprobs | None
    has_begun: bool = False


class CompletionStream:
    """Turns deltas of the engine into the chunks of one HTTP request, in the order to send."""

    def __init__(
        self, shape: ChoiceShape, head: dict[str, Any], inputs: Sequence[ProcessedInput]
    ) -> None:
        """Start a stream for all prompts of a request.

        Args:
            shape: the fields of its choices.
            head: the first fields of every chunk.
            inputs: the prompts, as sent to the engine.
        """
        self._shape = shape
        self._body = shape.body
        self._head = head
        self._inputs = inputs
        self._answers: dict[tuple[int, int], _Answer] = {}
        self._needs_prompt_logprobs = shape.params.prompt_logprobs is not None
        self._has_prompt_part = (
            shape.body.echo or self._needs_prompt_logprobs or shape.body.return_token_ids
        )
        self._prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}
        """Logprobs by prompt index; they arrive with the first token of its first answer."""
        self._held: dict[int, list[AnswerDelta]] = {}
        """Deltas by prompt index that wait until the prompt's logprobs have arrived."""
        self._num_prompt = sum(len(one.prompt_token_ids) for one in inputs)
        self._num_generated = 0
        self._num_cached = 0

    def chunks(self, i: int, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        """Chunks that can be sent after `delta` of prompt `i`; raises a failed answer's error."""
        if (error := failure(delta)) is not None:
            raise error
        if self._needs_prompt_logprobs and i not in self._prompt_logprobs:
            if delta.prompt_logprobs is None:
                self._held.setdefault(i, []).append(delta)
                return
            self._prompt_logprobs[i] = delta.prompt_logprobs
        for one in (delta, *self._held.pop(i, ())):
            yield from self._answer_chunks(i, self._shape.without_forced_token(one))

    def closing(self) -> Iterator[dict[str, Any]]:
        """The final chunk with the usage and no choices, if it was requested."""
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _answer_chunks(self, i: int, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        self._num_generated += len(delta.token_ids)
        if delta.final is not None:
            self._num_cached += delta.final.num_cached_tokens
        has_content = delta.text or delta.finish_reason is not None or delta.logprobs
        if not has_content and not (self._body.return_token_ids and delta.token_ids):
            return  # an incomplete character, or the possible start of a stop string
        answer = self._answer(i, delta.index)
        if not answer.has_begun and self._has_prompt_part:
            yield self._prompt_chunk(i, delta.index)
        answer.has_begun = True
        yield self._chunk(i, delta.index, self._shape.answer_part(delta, answer.logprobs))

    def _prompt_chunk(self, i: int, index: int) -> dict[str, Any]:
        """First chunk of a choice: its fields for the prompt."""
        part = self._shape.prompt_part(self._inputs[i], self._prompt_logprobs.get(i))
        if self._body.return_token_ids:
            part["token_ids"] = []
        return self._chunk(i, index, {**part, "finish_reason": None})

    def _answer(self, i: int, index: int) -> _Answer:
        answer = self._answers.get((i, index))
        if answer is None:
            logprobs = self._shape.answer_logprobs(self._inputs[i])
            answer = self._answers[i, index] = _Answer(logprobs)
        return answer

    def _chunk(self, i: int, index: int, part: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": [{"index": i * self._body.n + index, **part}]}
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._num_prompt, self._num_generated, self._num_cached)
