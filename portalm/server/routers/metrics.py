"""GET /metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from portalm.server.state import ServerState, state_of

router = APIRouter()


@router.get("/metrics")
async def metrics(state: Annotated[ServerState, Depends(state_of)]) -> Response:
    """Serve all metrics in Prometheus' text format."""
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
