"""GET /: the page that shows the engine at work. One HTML file, read once when the application is made.

The page takes text from strangers (prompts, request ids, recordings), so its headers let a browser run and load nothing but
what the file holds: its script and its style by their hashes, data from this server alone, and no text may become markup
(trusted types). The page itself holds nothing of anybody: what it shows it asks for like any client, with a key where keys
are set.
"""

import base64
import hashlib
import re
from functools import partial
from importlib.resources import files
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

PAGE: Final = "index.html"


def router() -> APIRouter:
    """The route of the page as it is in the package now."""
    made = APIRouter()
    body = files("minivllm.server").joinpath("static", PAGE).read_bytes()
    made.add_api_route("/", partial(_page, body, headers_of(body)), methods=["GET", "HEAD"], include_in_schema=False)
    return made


async def _page(body: bytes, headers: dict[str, str], request: Request) -> Response:
    """The page, or 304 for a browser that has this very one."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["etag"] in known:
        return Response(status_code=304, headers=headers)
    return Response(b"" if request.method == "HEAD" else body, headers=headers | {"content-length": str(len(body))})


def headers_of(body: bytes) -> dict[str, str]:
    """What browsers are told about the page."""
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(body, b'script')}",
            f"style-src {_hashes(body, b'style')}",
            "connect-src 'self'",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    return {
        "content-type": "text/html; charset=utf-8",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "cache-control": "no-cache",  # kept, but asked for each time: a new version shows at once
        "content-security-policy": policy,
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _hashes(body: bytes, tag: bytes) -> str:
    """The file's own elements of this name, as a policy names them."""
    inside = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in inside)
