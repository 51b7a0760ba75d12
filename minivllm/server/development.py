"""The application of ``uvicorn minivllm.server:app``: it brings its own engine, for development.

The engine starts in the application's lifespan, so that importing costs nothing. Uvicorn's own connection handling applies
here: header limits and the drain are those of ``mini-vllm serve`` (``http.py``), which is what production runs.
"""

import asyncio
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.async_llm import AsyncLLM
from minivllm.config import environment, make_config
from minivllm.door import locate, sampling_defaults, tokenizer_folder
from minivllm.engine.supervisor import start_engine
from minivllm.errors import StartupError
from minivllm.observe.metrics import metrics_for
from minivllm.server.application import create_app
from minivllm.text.tokenizer import load_tokenizer


class DevelopmentApp:
    """An ASGI app that becomes ``create_app``'s once its lifespan has begun. Written by that lifespan alone."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the lifespan, or pass the request to the application."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is None:
            raise RuntimeError("the server did not run this application's lifespan")
        else:
            await self._app(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Serve between startup and shutdown."""
        await receive()
        try:
            llm = await _start_llm()
        except StartupError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        pump = asyncio.create_task(llm.run())
        self._app = create_app(llm, llm.config, sampling_defaults(llm.config, Path(llm.config.model.model)))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        pump.cancel()
        await asyncio.wait({pump})
        await llm.close()
        await send({"type": "lifespan.shutdown.complete"})


async def _start_llm() -> AsyncLLM:
    """An engine for the bundled model, or for the one that MINIVLLM_MODEL names, with keys if MINIVLLM_API_KEY or
    MINIVLLM_API_KEY_FILE give some. Raises ``StartupError``."""
    given = environment()
    keys = tuple(given.get("api_key", "").split(",")) if "api_key" in given else ()
    config, folder = locate(make_config(model=given.get("model"), api_key=keys, api_key_file=given.get("api_key_file")))
    tokenizer = load_tokenizer(tokenizer_folder(config, folder))
    client = await start_engine(config)
    return AsyncLLM(client, tokenizer, config, metrics_for(config, client.info))
