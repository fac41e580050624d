"""POST /score and /rerank, also under /v1: cross-encoder scores, or cosines of embeddings."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from portalm.engine.input_processor import TextPair
from portalm.engine.scores import as_pairs, cosine, numbers
from portalm.pooling_params import PoolingParams
from portalm.server.replies.pooling import pool, usage
from portalm.server.schemas.pooling import (
    PoolingFields,
    RerankRequest,
    ScoreRequest,
    counted,
)
from portalm.server.state import ServerState, new_id, state_of

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


@router.post("/score")
@router.post("/v1/score")
async def score(body: ScoreRequest, request: Request, state: State) -> dict[str, Any]:
    """Score how similar or relevant the texts of each pair are."""
    model = state.check_model(body.model, None)
    score_id = new_id("score")
    first, second, names = body.texts()
    pairs = as_pairs(first, second, names)
    scores, used = await _scores(request, state, body, score_id, pairs, names)
    return {
        "id": score_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": i, "object": "score", "score": one} for i, one in enumerate(scores)],
        "usage": used,
    }


@router.post("/rerank")
@router.post("/v1/rerank")
async def rerank(body: RerankRequest, request: Request, state: State) -> dict[str, Any]:
    """Rank documents by their relevance to a query, most relevant first."""
    model = state.check_model(body.model, None)
    rerank_id = new_id("rerank")
    texts, limit = body.texts(), body.limit()
    pairs = [(body.query, text) for text in texts]
    scores, used = await _scores(request, state, body, rerank_id, pairs, ("query", "documents"))
    order = sorted(
        range(len(texts)), key=lambda i: -scores[i]
    )  # stable: equal scores keep their order
    return {
        "id": rerank_id,
        "model": model,
        "results": [
            {
                "index": i,
                **({"document": {"text": texts[i]}} if body.return_documents else {}),
                "relevance_score": scores[i],
            }
            for i in order[:limit]
        ],
        "usage": used,
    }


async def _scores(
    request: Request,
    state: ServerState,
    body: PoolingFields,
    base_id: str,
    pairs: list[tuple[str, str]],
    names: tuple[str, str],
) -> tuple[list[float], dict[str, int]]:
    """Score of each pair, and the usage object.

    Args:
        request: aborted if its client disconnects.
        state: state of the server.
        body: body of the request.
        base_id: id of the request, if the body has none.
        pairs: the texts to score.
        names: fields of the body that hold the first and the second texts, for errors.
    """
    counted(names[1], pairs)
    truncate = body.truncate_prompt_tokens
    if state.client.supports("score"):
        params = PoolingParams(task="score", truncate_prompt_tokens=truncate)
        both = [TextPair(*pair) for pair in pairs]
        labels = [f"{names[1]}[{i}]" for i in range(len(pairs))]
        pooled = await pool(request, state, body, base_id, both, params, labels)
        return [numbers(one)[0] for _, one in pooled], usage([output for output, _ in pooled])
    params = PoolingParams(truncate_prompt_tokens=truncate)
    texts: dict[str, str] = {}  # unique texts, and the field of the first occurrence of each
    for i, (first, second) in enumerate(pairs):
        texts.setdefault(first, names[0])
        texts.setdefault(second, f"{names[1]}[{i}]")
    once, labels = list(texts), list(texts.values())
    pooled = await pool(request, state, body, base_id, once, params, labels)
    vectors = {text: vector for text, (_, vector) in zip(once, pooled, strict=True)}
    scores = [cosine(vectors[first], vectors[second]) for first, second in pairs]
    return scores, usage([output for output, _ in pooled])
