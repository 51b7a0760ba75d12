"""The page beside an engine that makes 500 steps a second. How far behind it gets is measured by benchmarks/observe/page.py."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer
from page_driver import live, until


@pytest.fixture(scope="module")
def fast(repo: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.observe.paced_server", "--steps-per-s", "500", "--rows", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=repo)
    try:
        yield LiveServer(process).url
    finally:
        process.kill()
        process.wait()


def test_it_keeps_up(visit: Callable[..., Any], fast: str) -> None:
    page = visit(fast)
    live(page)
    for _ in range(4):
        page.wait_for_timeout(2000)
        newest = httpx.get(fast + "/steps", params={"limit": 0}).json()["next"]
        until(page, f"Number(document.documentElement.dataset.seq) >= {newest - 1}", 20)
    assert page.evaluate("glass.records.length") <= 4096
    assert page.evaluate("glass.lanes.every(lane => lane.end === null || lane.end >= glass.records[0].seq - 1100)")
    page.click("#pause")  # what it kept of the past can be gone through, and agrees with every record's own counts
    page.wait_for_selector("#transport:not([hidden])")
    for at in (0, 700, 2500):
        page.evaluate(
            "at => { const s = document.querySelector('#seek'); s.value = at; s.dispatchEvent(new Event('input')); }", at
        )
        page.wait_for_timeout(200)
        count = "(({total, cached, held}) => [total, cached.length, held.length])(glass.state.blocks)"
        total, cached, held = page.evaluate(count)
        record = page.evaluate("glass.records[glass.records.length - 1] || null")
        if record:
            told = (record["blocks_free"], record["blocks_cached"], record["blocks_referenced"])
            assert (total - cached - held, cached, held) == told
    page.click("#leave")
    newest = httpx.get(fast + "/steps", params={"limit": 0}).json()["next"]
    until(page, f"Number(document.documentElement.dataset.seq) >= {newest - 1}", 20)

