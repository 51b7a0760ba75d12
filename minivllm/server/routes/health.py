"""Probes: is it alive, and what is it."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm import __version__
from minivllm.server.replies import json_response
from minivllm.server.serving import serving

router = APIRouter()


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests can be served, 503 when the engine is dead (and, by the drain's gate, while the server stops)."""
    return Response(status_code=200 if serving(request).llm.alive else 503)


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})
