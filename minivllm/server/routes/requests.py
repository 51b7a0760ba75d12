"""GET /requests/{id}: where the time of one request went, while it runs and for some time after."""

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import UnknownRequest
from minivllm.observe.explain import CAPACITY
from minivllm.server.replies import json_response
from minivllm.server.serving import serving

router = APIRouter()


@router.get("/requests/{request_id}")
async def explain_request(request: Request, request_id: str) -> Response:
    """The explanation of a request by the id that its reply has, or of one of its texts. Once there are keys, only the
    request's own opens it; to others it is as if there were none. Raises ``UnknownRequest``."""
    s = serving(request)
    book = s.llm.explanations
    found = None if book is None else book.explain(request_id, time.monotonic(), s.tenant)
    if found is None:
        raise UnknownRequest(request_id, 0 if book is None else CAPACITY)
    return json_response(found)
