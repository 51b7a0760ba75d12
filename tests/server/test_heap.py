"""Freed memory goes back to the system when there is nothing to do, once after each time that there was."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_engine import Live, make_tokenizer

from minivllm.child import encode, pair
from minivllm.config import make_config
from minivllm.engine import process
from minivllm.engine.ipc import Add, Start, Stop
from minivllm.server import http
from minivllm.types import EngineInfo, GenerateRequest, SamplingParams

Until = Callable[[Callable[[], bool]], None]
HOLES = """
from pathlib import Path
from minivllm.heap import give_back

def own_kib():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

blocks = [bytes(20_000) for _ in range(5_000)]
full = own_kib()
del blocks[::2]  # holes of whole pages, none of them at the top
kept = own_kib()
give_back()
print(full, kept, own_kib())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_pages_between_living_blocks_go_back() -> None:
    told = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60).stdout
    full, kept, left = map(int, told.split())
    assert kept > 0.9 * full, "the allocator gave it back by itself, so this shows nothing"
    assert left < 0.8 * full


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When memory was given back."""
    times: list[float] = []
    for module in (process, http):
        monkeypatch.setattr(module, "give_back", lambda: times.append(time.monotonic()))
    return times


class OneStep:
    """An engine that is done with a request after a step."""

    info = EngineInfo(64, 4, 64, 16, 10, 100, (0,), "cpu", "float32", 0, 0, 0)
    has_work = False

    def __init__(self) -> None:
        self.num_steps = 0

    def add(self, request: GenerateRequest) -> None:
        self.has_work = True

    def step(self) -> None:
        self.num_steps += 1
        self.has_work = False

    def prepare_more(self) -> bool:
        return False

    def watch(self, announce: Any) -> None:
        pass


def test_an_engine_without_work_gives_back_once(monkeypatch: pytest.MonkeyPatch, given: list[float], until: Until) -> None:
    monkeypatch.setattr(process, "IDLE_S", 0.05)
    engine, (ours, theirs) = OneStep(), pair()
    thread = threading.Thread(target=process.EngineServer(theirs, lambda _: engine).run)  # type: ignore[arg-type,return-value]
    thread.start()
    request = GenerateRequest(id="r", prompt_ids=(1,), sampling=SamplingParams(seed=1, max_tokens=1), arrival_s=0.0)
    ours.sendall(encode(Start(make_config())))
    time.sleep(0.2)
    assert given == []  # it has computed nothing yet
    for n in (1, 2):
        ours.sendall(encode(Add(request)))
        until(lambda n=n: len(given) == n)
        time.sleep(0.2)
        assert (engine.num_steps, len(given)) == (n, n)
    ours.sendall(encode(Stop()))
    thread.join(10)
    assert not thread.is_alive()


def test_a_server_without_requests_gives_back_once(
    monkeypatch: pytest.MonkeyPatch, given: list[float], until: Until, tmp_path: Any
) -> None:
    monkeypatch.setattr(http, "TICK_S", 0.02)
    live = Live(make_tokenizer(tmp_path), make_config(port=0), delay_s=0.02).start()
    try:
        for n in (1, 2):
            httpx.post(f"{live.url}/generate", json={"prompt": "x", "max_tokens": 30}, timeout=20).raise_for_status()
            until(lambda n=n: len(given) == n)
            time.sleep(0.2)
            assert len(given) == n
    finally:
        live.end()
