"""Probes that cannot be true of a server that does not serve."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from scripted_engine import Live

from minivllm.errors import GenerationFailed
from minivllm.server import health
from minivllm.types import EngineHealth

Until = Callable[[Callable[[], bool]], None]


def status(live: Live, path: str) -> int:
    return httpx.get(live.url + path, timeout=20).status_code


def test_an_idle_server_shows_its_health_by_a_token(start: Callable[..., Live]) -> None:
    live = start()
    assert [status(live, path) for path in ("/live", "/ready", "/health", "/ping")] == [200] * 4
    (canary,) = live.client.added  # the second probe found the first one's token
    assert canary.id.startswith(health.CANARY)
    assert canary.sampling.max_tokens == 1


def test_a_token_of_anybody_shows_health(start: Callable[..., Live]) -> None:
    live = start()
    httpx.post(live.url + "/v1/completions", json={"prompt": "x", "max_tokens": 3})
    live.client.hold = True
    assert status(live, "/health") == 200
    assert len(live.client.added) == 1


def test_an_engine_that_gives_no_token_is_not_healthy(start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CANARY_S", 0.3)
    live = start()
    live.client.hold = True
    assert status(live, "/live") == 200
    assert status(live, "/health") == 503
    live.client.hold = False
    assert status(live, "/health") == 200
    assert live.llm.num_open == 0


def test_many_probes_are_one_canary(start: Callable[..., Live], until: Until) -> None:
    live = start()
    live.client.hold = True

    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=20) as client:
            probes = [asyncio.create_task(client.get(live.url + "/health")) for _ in range(20)]
            while not live.client.added:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            live.client.hold = False
            return [(await probe).status_code for probe in probes]

    assert asyncio.run(ask()) == [200] * 20
    assert len(live.client.added) == 1


def test_a_canary_that_fails_is_no_health(start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    live = start()

    def refuse(_: object) -> None:
        raise GenerationFailed("no")

    monkeypatch.setattr(live.llm, "open", refuse)
    assert status(live, "/health") == 503


def test_readiness_tells_why_not(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.02, max_num_queued_reqs=0)
    assert httpx.get(live.url + "/ready").json() == {"ready": True, "reason": ""}

    def reason() -> str:
        reply = httpx.get(live.url + "/ready")
        assert reply.status_code == 503
        return str(reply.json()["reason"])

    live.client.health = EngineHealth(up=False)
    assert "engine" in reason()
    live.client.health = EngineHealth(up=True)
    body = {"prompt": ["x"] * live.client.info.max_num_seqs, "max_tokens": 200, "stream": True}
    with httpx.stream("POST", live.url + "/v1/completions", json=body) as reply:
        pieces = reply.iter_raw()  # the stream lives as long as this does
        next(pieces)
        assert "queue is full" in reason()
        live.stop()
        until(lambda: live.server.drain.draining)
        assert "shutting down" in reason()
        assert status(live, "/live") == 200


def test_restarts_are_counted(start: Callable[..., Live]) -> None:
    live = start()
    live.client.health = EngineHealth(up=True, num_restarts=3)
    httpx.post(live.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert httpx.get(live.url + "/metrics").json()["engine_restarts"] == 3
    assert "vllm:engine_restarts_total" in httpx.get(live.url + "/metrics/prometheus").text
