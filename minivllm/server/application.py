"""The application, made from values: what it serves and the options. No module-level app, no global state.

Layers, outermost first, all plain ASGI: who asks, the drain's gate, the bounds on bodies, admission's gate, then FastAPI's
router. Every failure ends in one of the handlers below, the only makers of error answers above the HTTP parser besides those
layers.
"""

import logging
import time
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from minivllm import __version__
from minivllm.config import Config
from minivllm.errors import GenerationFailed, RequestError
from minivllm.server.admission import Admission, bounds_of
from minivllm.server.auth import AuthGate
from minivllm.server.drain import ClientGone, Drain, DrainGate
from minivllm.server.gate import AdmissionGate
from minivllm.server.health import Health
from minivllm.server.keys import Salts, read_keys
from minivllm.server.limits import BodyLimits
from minivllm.server.protocol import FORMS
from minivllm.server.replies import ErrorReply, error_response
from minivllm.server.routes import chat, completions, health, metrics, models, native, page, requests, steps, tokenize
from minivllm.server.serving import Serving
from minivllm.text.reply_parsers import parsers_of

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM

CLIENT_CLOSED = 499  # never sent: nobody is there to read it
logger = logging.getLogger("minivllm.server")


def create_app(llm: "AsyncLLM", config: Config, sampling_defaults: Mapping[str, Any] = MappingProxyType({})) -> FastAPI:
    """The application that serves ``llm``. Whoever runs it must run ``llm.run()`` beside it (``http.serve`` does).
    ``sampling_defaults``: of the /v1 routes (``door.sampling_defaults``). Raises ``InvalidOption`` for unknown parsers."""
    drain, keys = Drain(config.server.request_timeout_s), read_keys(config.server)
    admission = Admission(bounds_of(config.server, llm.info), time.monotonic(), llm.metrics.reject)
    app = FastAPI(
        title="mini-vLLM",
        version=__version__,
        docs_url=None,  # the page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the address of a redirection would be made of the Host header
        middleware=[
            Middleware(AuthGate, keys=keys),
            Middleware(DrainGate, drain=drain),
            Middleware(BodyLimits, limits=config.server),
            Middleware(AdmissionGate, admission=admission, max_body_bytes=config.server.max_body_bytes),
        ],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientGone: _client_gone,
            Exception: _unexpected,
        },
    )
    template = llm.tokenizer.template().source if llm.tokenizer.has_chat_template else None
    parsers = parsers_of(config.model.tool_call_parser, config.model.reasoning_parser, template)
    probes = Health(llm, drain, lambda: admission.full)
    app.state.serving = Serving(
        llm, config, int(time.time()), probes, admission, drain, parsers, sampling_defaults, Salts(keys)
    )
    for route in (native, completions, chat, models, tokenize, health, requests):
        app.include_router(route.router)
    app.include_router(page.router())
    if config.observe.step_records:
        app.include_router(steps.router())
    if config.server.metrics_port is None:
        app.include_router(metrics.router)
    _describe_bodies(app)
    return app


def create_metrics_app(serving: Serving) -> FastAPI:
    """/metrics and nothing else, for a port that only a monitoring network reaches."""
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    app.state.serving = serving
    app.include_router(metrics.router)
    return app


async def _request_error(_: Request, error: Exception) -> Response:
    """A request that cannot be served, as its error says."""
    if not isinstance(error, RequestError):
        raise error
    return error_response(error)


async def _http_error(_: Request, error: Exception) -> Response:
    """What the router itself refuses: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    phrase = HTTPStatus(error.status_code).phrase
    refusal = RequestError(f"{phrase}: this server has no such route or method; /openapi.json lists what it has.")
    refusal.status, refusal.kind = error.status_code, phrase
    response = error_response(refusal)
    response.headers.update(error.headers or {})
    return response


async def _client_gone(_: Request, __: Exception) -> Response:
    """The client has closed the connection."""
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(_: Request, __: Exception) -> Response:
    """A fault of ours. Starlette raises it again for the server's log, which ends the connection; the client learns nothing of
    the inside."""
    return error_response(GenerationFailed("The server failed on this request; its log says why."), close=True)


def _describe_bodies(app: FastAPI) -> None:
    """Let /openapi.json tell what bodies look like: FastAPI does not know our Structs."""
    structs = {form.path: form.struct for form in FORMS}
    schemas, components = msgspec.json.schema_components(
        [*structs.values(), ErrorReply], ref_template="#/components/schemas/{name}"
    )
    by_path = dict(zip(structs, schemas, strict=False))
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(components)
        for path, schema in by_path.items():
            content = {"application/json": {"schema": schema}}
            operation = document["paths"][path]["post"]
            operation["requestBody"] = {"required": True, "content": content}
            if "stream" in structs[path].__struct_fields__:
                operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        failure = {"description": "Failure", "content": {"application/json": {"schema": schemas[-1]}}}
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own form of refusal, which no client gets
                operation["responses"]["default"] = failure
        return document

    app.openapi = openapi  # type: ignore[method-assign]
