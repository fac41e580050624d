"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from portalm.engine.scores import numbers
from portalm.server.replies.pooling import pool, usage
from portalm.server.schemas.pooling import EmbeddingRequest
from portalm.server.state import ServerState, new_id, state_of

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """Embed each input as a vector."""
    model = state.check_model(body.model, "embed")
    inputs = body.inputs()
    labels = [f"input[{i}]" for i in range(len(inputs))] if len(inputs) > 1 else ["input"]
    pooled = await pool(request, state, body, new_id("embd"), inputs, body.params(), labels)

    def shown(vector: bytes) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(vector).decode()
        return numbers(vector)

    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": shown(vector)}
            for i, (_, vector) in enumerate(pooled)
        ],
        "model": model,
        "usage": usage([output for output, _ in pooled]),
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")
