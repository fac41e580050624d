"""/, a chat page with live status; /static, its files; /status, the data that it shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import FileResponse

from portalm import __version__
from portalm.server.state import ServerState, state_of

router = APIRouter()

_MEDIA_TYPES = {  # listed here: the machine's MIME table may differ
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FILES = {  # only these are served, so a name cannot escape the folder
    path.name: path
    for path in (Path(__file__).parents[1] / "static").iterdir()
    if path.suffix in _MEDIA_TYPES
}
_HEADERS = {
    # only files of this server, no inline script or style: model output cannot become code
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of the server has other files
}
_PROBE_S = 1.0


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Serve the page. It needs no API key; the endpoints that it calls do."""
    return _file("index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> FileResponse:
    """Serve a file of the page."""
    return _file(name)


def _file(name: str) -> FileResponse:
    path = _FILES.get(name)
    if path is None:
        raise HTTPException(404, f"the page has no file {name!r}")
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)


@router.get("/status")
async def status(state: Annotated[ServerState, Depends(state_of)]) -> dict[str, Any]:
    """State of the server, its device, and its current load.

    `load.time_s` is from a monotonic clock, so that two replies give rates. `engine` is null
    until the model is loaded; `loading` is null unless a model is being loaded.
    """
    name, reason = await _health(state)
    return {
        "state": name,
        "reason": reason,
        "version": __version__,
        "model": state.model_names[0],
        "uptime_s": max(0.0, time.time() - state.created),
        "loading": _loading(state),
        "engine_restarts": state.client.num_restarts,
        "engine": _engine(state),
        "load": _load(state),
    }


async def _health(state: ServerState) -> tuple[str, str | None]:
    """State (loading, ready, draining or unhealthy) and the reason for it."""
    if state.is_draining:
        return (
            "draining",
            "shutting down: no new requests are accepted, those in progress may finish",
        )
    problem = await state.client.health_problem(timeout_s=_PROBE_S)
    if problem is None:
        return "ready", None
    return "loading" if state.client.ready is None else "unhealthy", problem


def _loading(state: ServerState) -> dict[str, Any] | None:
    progress = state.client.progress
    return None if progress is None else {"phase": progress.phase, "share": progress.share}


def _engine(state: ServerState) -> dict[str, Any] | None:
    ready = state.client.ready
    if ready is None:
        return None
    return {
        "device": ready.device,
        "device_summary": ready.device_summary,
        "dtype": ready.dtype,
        "max_model_len": ready.max_model_len,
        "kv_tokens": ready.num_blocks * ready.block_size,
    }


def _load(state: ServerState) -> dict[str, float]:
    stats = state.client.stats
    return {
        "time_s": time.monotonic(),
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "kv_used": stats.kv_used,
        "kv_cached": stats.num_cached_blocks / max(1, stats.num_blocks),
        "prompt_tokens_total": stats.prompt_tokens_total,
        "generation_tokens_total": stats.generation_tokens_total,
        "prefix_queries_total": stats.prefix_queries_total,
        "prefix_hits_total": stats.prefix_hits_total,
    }
