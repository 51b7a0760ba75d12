"""POST /generate: the simplest way to text, made for a plain ``curl -d '{"prompt": "..."}' --no-buffer``.

JSON in, whatever the content type says (curl -d says it sends a form). That is exactly what a web page of another origin
can send without asking, so a foreign Origin header is refused. Text out as server-sent events, one per piece of text, the
end of the stream is the end of the answer; a failure is one event of type ``error`` with the error object as its data.
CR and CRLF in the text arrive as LF (``sse.py``). Greedy unless the request says otherwise.
"""

import ipaddress
from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import ForeignOrigin, RequestError
from minivllm.server.protocol import GENERATE, sampling_of
from minivllm.server.replies import error_body, new_id
from minivllm.server.serving import prompting, read_form, serving
from minivllm.server.sse import EventStream, text_event
from minivllm.types import RequestOutput

DEFAULT_MAX_TOKENS = 128  # or what is left of the context, if that is less

router = APIRouter()


@router.post("/generate")
async def generate(request: Request) -> Response:
    """Stream a completion of ``prompt`` as plain text events."""
    refuse_foreign_origin(request)
    s = serving(request)
    body = await read_form(request, GENERATE)
    request_id = new_id("gen")
    with prompting(request, request_id):
        ids = await s.encode(body.prompt)
        sampling = sampling_of(body, temperature=0.0, max_tokens=s.room_for(DEFAULT_MAX_TOKENS, len(ids)))
    return EventStream(s, s.orders(request_id, ids, sampling), _Script())


class _Script:
    """One event for each piece of text."""

    def __init__(self) -> None:
        self._held = ""  # a CR at the end of a piece may be half of a CRLF

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """The text as an event."""
        text = self._held + output.text
        self._held = "\r" if text.endswith("\r") and output.finish_reason is None else ""
        text = text.removesuffix("\r") if self._held else text
        return text_event(text) if text else b""

    def end(self) -> bytes:
        """Nothing: the end of the stream is the end of the answer."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """An event of its own type."""
        return text_event(error_body(error).decode(), "error")


def refuse_foreign_origin(request: Request) -> None:
    """Raise ``ForeignOrigin`` for a web page that did not come from this server.

    Only browsers send Origin. The page's host and port must be the ones asked for (Host), and a server that listens on the
    loopback address only answers pages of that address: a stranger's name can be made to point there (DNS rebinding).
    """
    origin = request.headers.get("origin")
    if origin is None:
        return
    try:
        page = urlsplit(origin)
        name = page.hostname or ""
    except ValueError:
        raise ForeignOrigin from None
    if page.scheme not in ("http", "https") or page.netloc != request.headers.get("host"):
        raise ForeignOrigin
    server = request.scope.get("server")
    if server is not None and _is_loopback(str(server[0])) and not _is_loopback(name):
        raise ForeignOrigin


def _is_loopback(host: str) -> bool:
    """True for the machine's own address or name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
