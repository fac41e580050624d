"""Replies to chat completions: choices of whole answers, and chunks of streamed ones."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import CompletionOutput, Logprob
from portalm.server.chat_plan import ChatPlan
from portalm.server.replies.chat_logprobs import chat_logprobs
from portalm.server.replies.stream import usage
from portalm.server.replies.text_logprobs import prompt_logprobs_object
from portalm.server.schemas.chat import ChatRequest
from portalm.server.state import ServerState, failure
from portalm.text.answer import AnswerParser, AnswerPiece
from portalm.text.char_parser import Content, Reasoning
from portalm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """Which fields a reply has, and how answers are parsed."""

    body: ChatRequest
    plan: ChatPlan
    processed: ProcessedInput
    tokenizer: Tokenizer

    def prompt_part(
        self, prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> dict[str, Any]:
        """Requested fields about the prompt, which all choices share."""
        part: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            part["prompt_logprobs"] = prompt_logprobs_object(
                prompt_logprobs, self.body.prompt_logprobs
            )
        if self.body.return_token_ids:
            part["prompt_token_ids"] = self.processed.prompt_token_ids
        return part

    def choice(self, answer: CompletionOutput) -> dict[str, Any]:
        """A whole answer as a choice."""
        parser = self.plan.new_parser()
        parser.push(answer.text)
        parser.finish()
        message: dict[str, Any] = {"role": "assistant", "content": parser.content}
        if parser.reasoning:
            message |= _reasoning(parser.reasoning)
        if parser.calls:
            message["content"] = parser.content or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in parser.calls
            ]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self.logprobs(answer),
            "finish_reason": _finish_reason(parser, answer.finish_reason),
            "stop_reason": answer.stop_reason,
            **({"token_ids": answer.token_ids} if self.body.return_token_ids else {}),
        }

    def logprobs(self, answer: CompletionOutput | AnswerDelta) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of an answer's tokens; None if they were not requested."""
        num_top = self.body.top_logprobs or 0
        return chat_logprobs(self.tokenizer, answer.token_ids, answer.logprobs, num_top)


async def chat_chunks(
    state: ServerState, shape: ChatShape, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks of a streamed reply; each begins with the fields of `head`."""
    stream = _ChatStream(shape, head)
    async for _, delta in state.answers([shape.processed], shape.plan.params):
        if (error := failure(delta)) is not None:
            raise error
        for chunk in stream.chunks(delta):
            yield chunk
    for chunk in stream.closing():
        yield chunk


class _ChatStream:
    """Turns deltas of the engine into chunks."""

    def __init__(self, shape: ChatShape, head: dict[str, Any]) -> None:
        self._shape = shape
        self._body = shape.body
        self._head = head
        self._num_answers = shape.plan.params.n
        self._parsers = [shape.plan.new_parser() for _ in range(self._num_answers)]
        self._num_prompt = len(shape.processed.prompt_token_ids)
        self._num_generated = 0
        self._num_cached = 0
        self._is_begun = False

    def chunks(self, delta: AnswerDelta) -> Iterator[dict[str, Any]]:
        """Chunks that can be sent after `delta`."""
        if not self._is_begun:  # not earlier: an error in the queue is replied to with a status
            self._is_begun = True
            for index in range(self._num_answers):
                yield {
                    **self._chunk(index, {"role": "assistant", "content": ""}),
                    **self._shape.prompt_part(delta.prompt_logprobs),
                    **self._usage_so_far(),
                }
        self._num_generated += len(delta.token_ids)
        if delta.final is not None:
            self._num_cached = delta.final.num_cached_tokens
        for chunk in self._pieces(delta):
            yield {**chunk, **self._usage_so_far()}

    def closing(self) -> Iterator[dict[str, Any]]:
        """The final chunk with the usage and no choices, if it was requested."""
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _pieces(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        parser = self._parsers[delta.index]
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        # no piece: an incomplete character, or the possible start of a stop string or tool call
        chunks = [self._chunk(delta.index, _delta(piece)) for piece in pieces]
        has_tokens = delta.logprobs or (self._body.return_token_ids and delta.token_ids)
        if not chunks and (has_tokens or delta.finish_reason is not None):
            chunks.append(self._chunk(delta.index, {}))
        if chunks:
            chunks[0]["choices"][0]["logprobs"] = self._shape.logprobs(delta)
            if self._body.return_token_ids:
                chunks[0]["choices"][0]["token_ids"] = delta.token_ids
            chunks[-1]["choices"][0] |= {
                "finish_reason": _finish_reason(parser, delta.finish_reason),
                "stop_reason": delta.stop_reason,
            }
        return chunks

    def _usage_so_far(self) -> dict[str, Any]:
        """The `usage` field of a chunk: null if only the last chunk reports it."""
        options = self._body.stream_options
        if options is None or not (options.include_usage or options.continuous_usage_stats):
            return {}
        return {"usage": self._usage() if options.continuous_usage_stats else None}

    def _usage(self) -> dict[str, Any]:
        return usage(self._num_prompt, self._num_generated, self._num_cached)

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        return {**self._head, "choices": [choice]}


def _delta(piece: AnswerPiece) -> dict[str, Any]:
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return _reasoning(piece.text)
    call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
    if piece.new_call is not None:
        call |= {"id": piece.new_call.id, "type": "function"}
        call["function"] = {"name": piece.new_call.name, "arguments": ""}
    return {"tool_calls": [call]}


def _reasoning(text: str) -> dict[str, str]:
    """Reasoning under both names in use: DeepSeek's, and the one that vLLM adopted later."""
    return {"reasoning_content": text, "reasoning": text}


def _finish_reason(parser: AnswerParser, reason: str | None) -> str | None:
    return "tool_calls" if reason == "stop" and parser.calls else reason
