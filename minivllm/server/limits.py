"""Bounds on a request's body, before any route sees it.

Bytes are counted as they come, whatever Content-Length says, so a chunked body without end is no way around. A body that is
declared too long is refused before it is read: the client gets its 413 while the connection still throws away what is
sent (``http.py`` bounds for how long). Compressed bodies are refused, because a small one can unpack to anything. Bounds on
the request line and the headers lie below ASGI, in ``http.py``.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.config import ServerConfig
from minivllm.errors import PayloadTooLarge, RequestError, RequestTooSlow, UnsupportedEncoding
from minivllm.server.replies import error_response


class BodyLimits:
    """ASGI layer that refuses long, slow and compressed bodies. Holds no state across requests."""

    def __init__(self, app: ASGIApp, limits: ServerConfig) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once where the headers tell enough; else count and time the body as the route reads it.

        ``PayloadTooLarge`` and ``RequestTooSlow`` are raised inside the route's own ``receive``.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refusal := self._refusal(dict(scope["headers"]))) is not None:
            await error_response(refusal)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, headers: dict[bytes, bytes]) -> RequestError | None:
        """What is wrong with a body that is described like this."""
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            return UnsupportedEncoding()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > self.limits.max_body_bytes):
            return PayloadTooLarge(self.limits.max_body_bytes)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """A ``receive`` that counts bytes and has one deadline for the whole body."""
        deadline_s = asyncio.get_running_loop().time() + self.limits.body_timeout_s
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()  # only the disconnect can come now, and it may take as long as it likes
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                raise RequestTooSlow("body", self.limits.body_timeout_s) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.max_body_bytes:
                raise PayloadTooLarge(self.limits.max_body_bytes)
            return message

        return limited
