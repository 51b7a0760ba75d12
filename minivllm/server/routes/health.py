"""Probes: is it alive, is it ready, is it well, and what is it."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm import __version__
from minivllm.server.replies import json_response
from minivllm.server.serving import serving

router = APIRouter()


@router.get("/live", response_class=Response)
async def live() -> Response:
    """200: the server's loop turns."""
    return Response()


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while new requests are welcome, else 503 and why not."""
    why_not = serving(request).health.why_not_ready()
    return json_response({"ready": why_not is None, "reason": why_not or ""}, 200 if why_not is None else 503)


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
@router.get("/health", response_class=Response)
async def health(request: Request) -> Response:
    """200 when a token came within the last seconds, if need be one that was asked for now; else 503."""
    return Response(status_code=200 if await serving(request).health.healthy() else 503)


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})
