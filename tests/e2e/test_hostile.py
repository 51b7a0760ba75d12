"""A few thousand hostile requests at the real server; ``benchmarks.reliability.hostile`` sends them by the hundred thousand."""

import asyncio
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from live_server import serve

NUM_REQUESTS, SEED = 2500, 11


@pytest.fixture
def hostile(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks`` is no part of the package: import it from the repository."""
    monkeypatch.syspath_prepend(str(repo))
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    return import_module("benchmarks.reliability.hostile")


@pytest.mark.slow
def test_hostile_requests_hurt_nobody(hostile: Any) -> None:
    with serve("--batch-invariant", "--max-model-len", "256", "--keep-alive-timeout-s", "120") as live:
        before = hostile.lasting(live.process.pid)
        attack = hostile.Attack(int(live.url.rsplit(":", 1)[1]), NUM_REQUESTS, SEED)
        asyncio.run(attack.run(16))
        assert attack.broken == []
        assert sum(attack.statuses.values()) == NUM_REQUESTS and attack.statuses[200] > 100 and attack.statuses[400] > 1000
        assert attack.num_canaries >= len(hostile.CANARIES)
        assert hostile.lasting(live.process.pid) == before
        live.wait_idle()


def test_a_broken_promise_is_seen(hostile: Any) -> None:
    """The look at answers finds each kind of fault."""
    attack = hostile.Attack(0, 0, 0)
    request = hostile.Request(b"POST / HTTP/1.1\r\n\r\n")
    found = [
        attack.fault(request, status, body)
        for status, body in (
            (500, b""), (599, b""), (0, b""), (400, b"x" * 5000), (400, b'{"error": "<a at 0x7f>"}'),
            (200, b'data: {"error":{"message":"x","type":"x","param":null,"code":500}}\n\ndata: [DONE]\n\n'),
        )
    ]  # fmt: skip
    assert None not in found and len(set(found)) == 6
    assert [attack.fault(request, status, b"{}") for status in (200, 400, 404, 413, 503)] == [None] * 5
    assert attack.fault(hostile.Request(b"x", plain=False), 0, b"") is None


def test_the_same_seed_makes_the_same_requests(hostile: Any) -> None:
    def made(seed: int) -> list[bytes]:
        attacker = hostile.Attacker(seed)
        return [attacker.next().data for _ in range(300)]

    assert made(1) == made(1) != made(2)
