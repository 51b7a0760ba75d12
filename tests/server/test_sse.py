"""The bytes of a stream: the same whichever way they are made and sent."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from scripted_engine import Live, ScriptedClient

from minivllm.async_llm import AsyncLLM
from minivllm.config import make_config
from minivllm.observe.metrics import metrics_for
from minivllm.server.application import create_app
from minivllm.server.replies import ChatChunk, ChunkChoice, Completion, CompletionChoice, Delta, encode
from minivllm.server.sse import MARK, TextEvents, json_event
from minivllm.text.tokenizer import Tokenizer

TEXTS = ["a", '"quoted\\"', "\r\n\t\x00", "你好 😀", "\u2028", MARK, MARK + MARK, "}]}"]
NAMES = ["stories", '"odd"\\', "名", MARK, encode(MARK).decode()]


def completion(name: str, text: str) -> msgspec.Struct:
    return Completion(id="cmpl-1", created=7, model=name, choices=(CompletionChoice(3, text),))


def chat_chunk(name: str, text: str) -> msgspec.Struct:
    return ChatChunk(id="chatcmpl-1", created=7, model=name, choices=(ChunkChoice(0, Delta(None, text)),))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [completion, chat_chunk])
def test_an_event_from_the_cut_chunk_is_the_event_of_the_whole(make: Callable[[str, str], msgspec.Struct], name: str) -> None:
    events = TextEvents(make(name, MARK))
    for text in TEXTS:
        assert events.event(text) == json_event(encode(make(name, text)))


BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x", "max_tokens": 9},
    "/v1/completions": {"prompt": ["x", "y z"], "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "stream": True},
}


def told(path: str, text: str) -> list[Any]:
    """What a stream says, without what is different in every reply; a choice's pieces are joined."""
    data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    if path == "/generate":
        return ["".join(data)]
    texts: dict[int, str] = {}
    rest: list[Any] = [data[-1]]
    for chunk in map(json.loads, data[:-1]):
        for choice in chunk["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            rest += [choice["finish_reason"]] if choice["finish_reason"] else []
        rest += [chunk["usage"]] if "usage" in chunk else []
    return [texts, *rest]


@pytest.mark.parametrize("path", BODIES)
def test_a_server_that_is_not_ours_streams_the_same(live: Live, tokenizer: Tokenizer, path: str) -> None:
    """The application alone is plain ASGI; the connection of ``mini-vllm serve`` only offers it a shorter way."""

    async def scene() -> httpx.Response:
        config = make_config(served_model_name=("fox", "bear"))
        client = ScriptedClient(tokenizer)
        llm = AsyncLLM(client, tokenizer, config, metrics_for(config, client.info))
        task = asyncio.create_task(llm.run())
        transport = httpx.ASGITransport(app=create_app(llm, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            reply = await http.post(path, json=BODIES[path])
        task.cancel()
        return reply

    ours = httpx.post(live.url + path, json=BODIES[path])
    other = asyncio.run(scene())
    assert ours.status_code == other.status_code == 200
    assert ours.headers["content-type"] == other.headers["content-type"]
    assert told(path, ours.text) == told(path, other.text)
    assert len("".join(map(str, told(path, ours.text)))) > 20
