"""/health, /health/live, /health/ready, /load and /version."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from portalm import __version__
from portalm.server.errors import error_response
from portalm.server.state import ServerState, state_of

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Liveness: 200 if the server process responds."""
    return {"status": "alive"}


@router.get("/health")
async def health(state: State) -> JSONResponse:
    """200 while the engine makes progress, or is idle and its device responds; else 503."""
    problem = await state.client.health_problem()
    if problem is not None:
        return error_response(503, problem)
    return JSONResponse({"status": "healthy"})


@router.get("/health/ready")
async def ready(state: State) -> JSONResponse:
    """Readiness: 200 while the server accepts new requests; else 503 with the reason."""
    problem = "shutting down" if state.is_draining else await state.client.health_problem()
    if problem is not None:
        return error_response(503, f"not ready: {problem}")
    return JSONResponse({"status": "ready"})


@router.get("/load")
async def load(state: State) -> dict[str, int]:
    """Number of requests in progress."""
    return {"server_load": state.client.num_open}


@router.get("/version")
async def version() -> dict[str, str]:
    """Version of PortaLM."""
    return {"version": __version__}
