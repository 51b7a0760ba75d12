"""The ASGI layer of ``admission.py``: every request with a body has a ticket before anybody reads that body.

The ticket lies in the scope's state. The route that knows what the request costs settles it (``Serving.admitted``); it is given
back here when the answer is over, whichever way it ended.
"""

import time
from collections.abc import Mapping
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.errors import RequestError
from minivllm.observe.trail import Trail
from minivllm.server.admission import BYTES_PER_TOKEN, Admission, Ticket
from minivllm.server.keys import TENANT
from minivllm.server.replies import error_response

PROBES: Final = ("/ping",)  # may be posted to, and must be answered when the server is full
TICKET: Final = "ticket"  # in the scope's state
TRAIL: Final = "trail"  # likewise


class AdmissionGate:
    """Lets requests in, or answers 503 or 429. Holds no state of its own."""

    def __init__(self, app: ASGIApp, admission: Admission, max_body_bytes: int) -> None:
        self.app = app
        self.admission = admission
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its ticket."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        state, headers = scope.setdefault("state", {}), dict(scope["headers"])
        tenant: str = state.get(TENANT, "")
        trail = Trail(time.monotonic(), tenant, headers.get(b"traceparent", b"").decode("latin-1"))
        try:
            ticket = self.admission.reserve(tenant, self._guess(headers), trail.received_s)
        except RequestError as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        state[TICKET], state[TRAIL] = ticket, trail
        try:
            await self.app(scope, receive, send)
        finally:
            now_s = time.monotonic()
            self.admission.release(ticket, now_s)
            trail.delivered(now_s)

    def _guess(self, headers: Mapping[bytes, bytes]) -> int:
        """Tokens of a body that is not here yet; of one whose length is not told, as many as there may be."""
        length = headers.get(b"content-length", b"")
        num_bytes = int(length) if length.isdigit() and len(length) <= 15 else self.max_body_bytes
        return min(num_bytes, self.max_body_bytes) // BYTES_PER_TOKEN


def trail_of(scope: Scope) -> Trail:
    """The stamps of this request. Raises ``RuntimeError`` for one that came around the gate."""
    trail = scope.get("state", {}).get(TRAIL)
    if not isinstance(trail, Trail):
        raise RuntimeError("a request came around the gate")
    return trail


def ticket_of(scope: Scope) -> Ticket:
    """The ticket of this request. Raises ``RuntimeError`` for one that came around the gate."""
    ticket = scope.get("state", {}).get(TICKET)
    if not isinstance(ticket, Ticket):
        raise RuntimeError("a request came around the gate")
    return ticket
