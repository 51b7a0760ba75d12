"""Servers to attack: real sockets and the real application, on an engine that says what it is told, or on the real one."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, serve
from scripted_engine import Live, make_tokenizer

from minivllm.config import make_config
from minivllm.text.tokenizer import Tokenizer, load_tokenizer

KEYS = {"ann": "key-of-ann-0123456789", "bob": "key-of-bob-9876543210"}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who may ask\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer, key_file: Path) -> Iterator[Live]:
    """A server with two tenants' keys."""
    live = Live(tokenizer, make_config(port=0, served_model_name=("fox",), api_key_file=str(key_file))).start()
    yield live
    live.end()


@pytest.fixture(scope="module")
def unlocked(tokenizer: Tokenizer) -> Iterator[Live]:
    """A server without keys."""
    live = Live(tokenizer, make_config(port=0, served_model_name=("fox",))).start()
    yield live
    live.end()


@pytest.fixture(scope="session")
def real() -> Iterator[LiveServer]:
    """The bundled model behind ``mini-vllm serve``."""
    with serve("--max-num-seqs", "16", "--batch-invariant", "--tool-call-parser", "hermes") as live:
        yield live


@pytest.fixture(scope="session")
def http(real: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def speak() -> Callable[..., bytes]:
    """``speak(port, data)``: send bytes, and read until the server closes or has nothing more to say."""

    def exchange(port: int, data: bytes, quiet_s: float = 0.15) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            got = sock.recv(65536)
            sock.settimeout(quiet_s)
            with contextlib.suppress(OSError):
                while part := sock.recv(65536):
                    got += part
            return got
        return b""

    return exchange


@pytest.fixture
def refused() -> Callable[..., dict[str, Any]]:
    """Checks that a reply is a refusal of the form and size that every refusal has; the error."""

    def check(reply: httpx.Response, *statuses: int) -> dict[str, Any]:
        assert reply.status_code in (statuses or (400,)), (reply.status_code, reply.text[:300])
        assert len(reply.content) <= 4096
        error: dict[str, Any] = json.loads(reply.content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        for leak in (" at 0x", "Traceback", "site-packages", "minivllm/", "msgspec", ".py"):
            assert leak not in reply.text
        return error

    return check
