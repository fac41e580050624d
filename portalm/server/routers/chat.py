"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import CompletionOutput, Logprob
from portalm.server.auth import salt_for, tenant_of
from portalm.server.chat_plan import ChatPlan, plan_chat
from portalm.server.replies.answers import collect
from portalm.server.replies.beam_search import search_beams
from portalm.server.replies.chat_logprobs import chat_logprobs
from portalm.server.replies.stream import event_stream, usage
from portalm.server.replies.text_logprobs import prompt_logprobs_object
from portalm.server.schemas.chat import ChatRequest
from portalm.server.state import ServerState, failure, new_id, state_of
from portalm.text.answer import AnswerParser, AnswerPiece
from portalm.text.char_parser import Content, Reasoning

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """The assistant's next message."""
    model = state.check_model(body.model)
    params, tools = body.params(), body.tool_use()
    beams = body.beams(params.n, params.max_tokens)
    chat_id = new_id("chatcmpl")
    plan = plan_chat(
        state.client.tokenizer,
        state.choose_template(body.chat_template, has_tools=bool(tools.tools)),
        state.answer_format,
        body.as_conversation(tools),
        params,
        tools,
    )
    processed = await state.client.check(
        body.request_id or chat_id,
        plan.prompt,
        plan.params,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        priority=body.priority,
        cache_salt=salt_for(request, body.cache_salt),
        tenant=tenant_of(request),
        add_special_tokens=False,  # the template writes BOS itself
    )
    head = {"id": chat_id, "created": int(time.time()), "model": model}
    if body.stream:
        chunk_head = {**head, "object": "chat.completion.chunk"}
        return event_stream(_chunks(state, body, chunk_head, processed, plan))
    if beams is None:
        answers = await collect(request, state, [processed], plan.params)
    else:
        answers = await search_beams(request, state, [processed], plan.params, beams)
    [output] = answers.outputs
    choices = [_choice(state, body, plan, answer) for answer in output.outputs]
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": choices,
            "usage": answers.usage(),
            **_of_prompt(body, processed, output.prompt_logprobs),
        }
    )


def _of_prompt(
    body: ChatRequest,
    processed: ProcessedInput,
    prompt_logprobs: list[dict[int, Logprob] | None] | None,
) -> dict[str, Any]:
    """What is asked for of the prompt, which all choices share."""
    told: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        told["prompt_logprobs"] = prompt_logprobs_object(prompt_logprobs, body.prompt_logprobs)
    if body.return_token_ids:
        told["prompt_token_ids"] = processed.prompt_token_ids
    return told


def _choice(
    state: ServerState, body: ChatRequest, plan: ChatPlan, answer: CompletionOutput
) -> dict[str, Any]:
    parser = plan.new_parser()
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
        "logprobs": _logprobs(state, body, answer),
        "finish_reason": _finish_reason(parser, answer.finish_reason),
        "stop_reason": answer.stop_reason,
        **({"token_ids": answer.token_ids} if body.return_token_ids else {}),
    }


def _logprobs(
    state: ServerState, body: ChatRequest, answer: CompletionOutput | AnswerDelta
) -> dict[str, Any] | None:
    return chat_logprobs(
        state.client.tokenizer, answer.token_ids, answer.logprobs, body.top_logprobs or 0
    )


async def _chunks(
    state: ServerState,
    body: ChatRequest,
    head: dict[str, Any],
    processed: ProcessedInput,
    plan: ChatPlan,
) -> AsyncGenerator[Any, None]:
    options = body.stream_options
    num_prompt, num_generated, num_cached = len(processed.prompt_token_ids), 0, 0
    parsers = [plan.new_parser() for _ in range(plan.params.n)]
    is_begun = False
    async for _, delta in state.answers([processed], plan.params):
        if (error := failure(delta)) is not None:
            raise error
        if not is_begun:  # not before: what fails in the queue is answered with a status
            is_begun = True
            for index in range(plan.params.n):
                yield {
                    **_chunk(head, index, {"role": "assistant", "content": ""}),
                    **_of_prompt(body, processed, delta.prompt_logprobs),
                    **_usage_so_far(body, num_prompt, 0, 0),
                }
        num_generated += len(delta.token_ids)
        if delta.final is not None:
            num_cached = delta.final.num_cached_tokens
        parser = parsers[delta.index]
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        # none: half a character, or what may begin a stop string or a tool call
        chunks = [_chunk(head, delta.index, _delta(piece)) for piece in pieces]
        is_told = delta.logprobs or (body.return_token_ids and delta.token_ids)
        if not chunks and (is_told or delta.finish_reason is not None):
            chunks.append(_chunk(head, delta.index, {}))
        if chunks:
            chunks[0]["choices"][0]["logprobs"] = _logprobs(state, body, delta)
            if body.return_token_ids:
                chunks[0]["choices"][0]["token_ids"] = delta.token_ids
            chunks[-1]["choices"][0] |= {
                "finish_reason": _finish_reason(parser, delta.finish_reason),
                "stop_reason": delta.stop_reason,
            }
        for chunk in chunks:
            yield {**chunk, **_usage_so_far(body, num_prompt, num_generated, num_cached)}
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": usage(num_prompt, num_generated, num_cached)}


def _usage_so_far(
    body: ChatRequest, num_prompt: int, num_generated: int, num_cached: int
) -> dict[str, Any]:
    """What a chunk says of usage: nothing, unless the last one shall."""
    options = body.stream_options
    if options is None or not (options.include_usage or options.continuous_usage_stats):
        return {}
    if not options.continuous_usage_stats:
        return {"usage": None}
    return {"usage": usage(num_prompt, num_generated, num_cached)}


def _chunk(head: dict[str, Any], index: int, delta: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }
    return {**head, "choices": [choice]}


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
    """Under both names: DeepSeek's, which most clients read, and the one that vLLM took later."""
    return {"reasoning_content": text, "reasoning": text}


def _finish_reason(parser: AnswerParser, reason: str | None) -> str | None:
    return "tool_calls" if reason == "stop" and parser.calls else reason
