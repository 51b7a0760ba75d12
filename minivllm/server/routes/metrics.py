"""GET /metrics: JSON for eyes, the exposition format for Prometheus, which asks for it in its Accept header."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from minivllm.observe.prometheus import CONTENT_TYPE
from minivllm.server.replies import json_response
from minivllm.server.serving import serving

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts of the engine: a flat JSON object, or the exposition format if text/plain or OpenMetrics is asked for."""
    accept = request.headers.get("accept", "")
    if "text/plain" in accept or "openmetrics" in accept:
        return await prometheus(request)
    return json_response(serving(request).llm.metrics.json())


@router.get("/metrics/prometheus", response_class=PlainTextResponse)
async def prometheus(request: Request) -> Response:
    """The exposition format in any case."""
    return Response(serving(request).llm.metrics.prometheus(), headers={"content-type": CONTENT_TYPE})
