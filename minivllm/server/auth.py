"""The ASGI layer that asks for a key, before anything else looks at a request.

Once there are keys, every path needs one, whether it exists or not, whatever the method: a new route is closed until it is
listed in ``OPEN_PATHS``. The path is the one of the request line as it came (``raw_path``), which the router uses too. It is
never put together from the Host header, which a client can fill with what it likes (CVE-2026-48746). The body is not looked
at: a stranger's is never read.
"""

from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.server.keys import TENANT, Keys

OPEN_PATHS: Final = frozenset({"/", "/live", "/ready", "/health"})  # the page and the probes: they tell nothing of a tenant's
UNAUTHORIZED: Final = b'{"error":"Unauthorized"}'


class AuthGate:
    """The outermost ASGI layer: answers 401 to whoever has no key. Holds no state across requests."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its tenant, or refuse it."""
        if scope["type"] == "websocket":  # nothing of the kind is spoken here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            tenant = self._tenant(scope)
            if tenant is None:
                headers = {"www-authenticate": "Bearer"}
                await Response(UNAUTHORIZED, 401, headers, media_type="application/json")(scope, receive, send)
                return
            scope.setdefault("state", {})[TENANT] = tenant
        await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """Who asks; None: nobody whom we know."""
        if not self.keys:
            return ""
        path = scope["path"]
        if path in OPEN_PATHS and scope.get("raw_path", path.encode()) == path.encode():
            return ""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return self.keys.tenant(key.strip(b" \t")) if scheme.lower() == b"bearer" else None
