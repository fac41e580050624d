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
    """The server process answers."""
    return {"status": "alive"}


@router.get("/health")
async def health(state: State) -> JSONResponse:
    """200 while steps end in their time, or the idle device answers; else 503 and what is wrong."""
    problem = await state.client.health_problem()
    if problem is not None:
        return error_response(503, problem)
    return JSONResponse({"status": "healthy"})


@router.get("/health/ready")
async def ready(state: State) -> JSONResponse:
    """200 while new requests are taken."""
    problem = "shutting down" if state.is_draining else await state.client.health_problem()
    if problem is not None:
        return error_response(503, f"not ready: {problem}")
    return JSONResponse({"status": "ready"})


@router.get("/load")
async def load(state: State) -> dict[str, int]:
    """Requests that are being answered."""
    return {"server_load": state.client.num_open}


@router.get("/version")
async def version() -> dict[str, str]:
    """PortaLM's version."""
    return {"version": __version__}
