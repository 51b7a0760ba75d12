"""A scripted engine under the real AsyncLLM, served over real sockets."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import Live, make_tokenizer

from minivllm.config import make_config
from minivllm.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., Live]]:
    """Start servers with these options; all are stopped at the end."""
    started: list[Live] = []

    def start_one(delay_s: float = 0.0, context: int = 512, **options: Any) -> Live:
        config = make_config(port=0, served_model_name=("fox", "bear"), **options)
        started.append(Live(tokenizer, config, delay_s, context).start())
        return started[-1]

    yield start_one
    for live in started:
        live.end()


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Live]:
    """One server for all tests of a file that leave it as it was."""
    live = Live(tokenizer, make_config(port=0, served_model_name=("fox", "bear"))).start()
    yield live
    live.end()


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The file's server with its script as at first."""
    fresh = type(shared.client)(shared.tokenizer)
    shared.client.text, shared.client.ends = fresh.text, False
    shared.client.hold = shared.client.failing = False
    shared.client.added.clear()
    shared.client.aborted.clear()
    yield shared
    assert shared.client.num_open == 0


@pytest.fixture(scope="module")
def pool(shared: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=20, verify=False) as client:
        yield client


@pytest.fixture
def http(pool: httpx.Client, live: Live) -> httpx.Client:
    """A client of the file's server."""
    return pool


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that the server does on its own; fail if it does not."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    return wait
