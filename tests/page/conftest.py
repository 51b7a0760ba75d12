"""The page in a real browser, against a real server with the bundled model."""

import gzip
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live_server import LiveServer, serve
from page_driver import live

from benchmarks.observe.browser import chromium, chromium_path, watch

OPTIONS = ("--num-gpu-blocks-override", "200", "--max-num-seqs", "16", "--max-num-batched-tokens", "64")
DESKTOP = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Where it is missing the tests are skipped, but not in continuous integration, which installs it. It ends with
    the file: while Playwright is there, no other test of this process could run an event loop."""
    if chromium_path() is None and os.environ.get("CI") != "true":
        pytest.skip("no chromium is installed; on Debian: apt-get install chromium")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``server`` records its steps."""
    return tmp_path_factory.mktemp("recording") / "steps.rec"


@pytest.fixture(scope="module")
def server(recording: Path) -> Iterator[LiveServer]:
    """One server for all tests of a file."""
    with serve(*OPTIONS, "--record-steps", str(recording)) as live:
        yield live


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """``visit(url, **context)`` -> a page there that stands still where others slide. Nothing may go wrong on any of them,
    but what ``may_log`` matches."""
    opened: list[tuple[Any, list[str], str]] = []

    def visit_one(url: str, may_log: str = "(?!)", **context: Any) -> Any:
        context = {"viewport": DESKTOP, "reduced_motion": "reduce", **context}
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(60_000)
        opened.append((page, watch(page), may_log))
        page.goto(url)
        return page

    yield visit_one
    for page, wrong, may_log in opened:
        page.context.close()
        assert [line for line in wrong if not re.search(may_log, line)] == []


@pytest.fixture
def page(visit: Callable[..., Any], server: LiveServer) -> Any:
    """The page of ``server``, live."""
    made = visit(server.url + "/")
    live(made)
    return made


@pytest.fixture
def write_recording(tmp_path: Path) -> Callable[..., Path]:
    """``write_recording(records, header, cut=0)`` -> a file of them, without its last ``cut`` bytes."""

    def write(records: list[Any], header: dict[str, Any], cut: int = 0) -> Path:
        path = tmp_path / "made.rec"
        parts = [msgspec.msgpack.encode(value) for value in (header, *records)]
        body = gzip.compress(b"".join(msgspec.msgpack.encode(len(part)) + part for part in parts))
        path.write_bytes(body[: len(body) - cut])
        return path

    return write
