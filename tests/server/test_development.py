"""``uvicorn minivllm.server:app``: an app that brings its own engine, made only when asked for."""

import asyncio
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedClient

from minivllm.config import Config
from minivllm.errors import NotEnoughMemory
from minivllm.server.development import DevelopmentApp
from minivllm.text.tokenizer import load_tokenizer


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that an engine was asked for."""
    found: list[Config] = []

    async def start_engine(config: Config) -> ScriptedClient:
        found.append(config)
        return ScriptedClient(load_tokenizer(Path(config.model.model)))

    monkeypatch.setattr(importlib.import_module("minivllm.server.development"), "start_engine", start_engine)
    return found


async def lifespan(app: Any, use: Any) -> list[dict[str, Any]]:
    """Run ``use`` between the startup and the shutdown of ``app``; what the app said."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(dict(message))

    task = asyncio.create_task(app({"type": "lifespan"}, inbox.get, send))
    await inbox.put({"type": "lifespan.startup"})
    while not said:
        await asyncio.sleep(0.01)
    if said[0]["type"] == "lifespan.startup.complete":
        await use()
        await inbox.put({"type": "lifespan.shutdown"})
    await task
    return said


def test_it_serves_the_bundled_model(started: list[Config], bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_MODEL", raising=False)
    app = DevelopmentApp()
    replies: list[httpx.Response] = []

    async def use() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            replies.append(await client.get("/v1/models"))
            replies.append(await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4}))

    said = asyncio.run(lifespan(app, use))
    assert [m["type"] for m in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert started[0].model.model == str(bundled_model)
    assert replies[0].json()["data"][0]["id"] == "stories"
    assert replies[1].json()["usage"]["completion_tokens"] == 4


def test_it_serves_the_model_that_the_environment_names(
    started: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVLLM_MODEL", str(tmp_path / "nowhere"))
    said = asyncio.run(lifespan(DevelopmentApp(), None))
    assert said[0]["type"] == "lifespan.startup.failed"
    assert "nowhere" in said[0]["message"]
    assert started == []


def test_an_engine_that_cannot_start_is_a_sentence(started: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: Config) -> None:
        raise NotEnoughMemory("No room; take a smaller model.")

    monkeypatch.delenv("MINIVLLM_MODEL", raising=False)
    monkeypatch.setattr(importlib.import_module("minivllm.server.development"), "start_engine", fail)
    said = asyncio.run(lifespan(DevelopmentApp(), None))
    assert said == [{"type": "lifespan.startup.failed", "message": "No room; take a smaller model."}]


def test_uvicorn_finds_it_by_name() -> None:
    """In a fresh process, as uvicorn looks it up."""
    code = "from uvicorn.importer import import_from_string as find\n"
    code += "print(type(find('minivllm.server:app')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "DevelopmentApp\n"
