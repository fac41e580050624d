"""/v1/models, /tokenize, /detokenize and /tokenizer_info: the served model and its tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from portalm.errors import InvalidRequest
from portalm.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from portalm.server.state import ServerState, state_of

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


def _card(state: ServerState, name: str) -> dict[str, Any]:
    ready = state.client.ready
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "portalm",
        "root": state.client.config.model,
        "max_model_len": ready.max_model_len if ready is not None else None,
    }


@router.get("/v1/models")
async def list_models(state: State) -> dict[str, Any]:
    """List the names of the served model."""
    return {"object": "list", "data": [_card(state, name) for name in state.model_names]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, state: State) -> dict[str, Any]:
    """Describe the model under one of its names."""
    return _card(state, state.check_model(name, None))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> dict[str, Any]:
    """Tokenize a text or a conversation."""
    state.check_model(body.model, None)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages, not both or neither", param="prompt")
    tokenizer = state.client.tokenizer
    if body.messages is not None:
        template = state.choose_template(body.chat_template)
        text = template.render(body.conversation_of(body.messages))
        add_special_tokens = False  # the template writes BOS itself
    else:
        text, add_special_tokens = body.prompt or "", body.add_special_tokens
    ids = await state.client.encode(text, add_special_tokens=add_special_tokens)
    ready = state.client.ready
    length = ready.max_model_len if ready is not None else None
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.id_to_token(token_id) for token_id in ids]
    return answer


@router.get("/tokenizer_info")
async def tokenizer_info(state: State) -> dict[str, str | None]:
    """Special tokens by role, and the chat template, for clients that render prompts themselves."""
    tokenizer = state.client.tokenizer
    return {**tokenizer.special.roles, "chat_template": tokenizer.chat_template}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> dict[str, str]:
    """Convert token ids to text."""
    state.check_model(body.model, None)
    tokenizer = state.client.tokenizer
    for token_id in body.tokens:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary (0 to {tokenizer.vocab_size - 1})",
                param="tokens",
            )
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
