"""Clients as the benchmarks need them: they note when bytes come, may stop reading, and may leave at any moment."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any


def request_bytes(path: str, body: Mapping[str, Any]) -> bytes:
    """A POST with a JSON body."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Reply(asyncio.Protocol):
    """One request's reply. Written by its event loop; ``on_data`` is called whenever bytes came."""

    def __init__(self, keeps: bool = True, on_data: "Callable[[Reply], None] | None" = None) -> None:
        self.began_s = time.perf_counter()
        self.times_s: list[float] = []  # when bytes came
        self.data = b""  # all of them, or the last few
        self.closed = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self._keeps = keeps
        self._on_data = on_data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.times_s.append(time.perf_counter())
        self.data = self.data + data if self._keeps else (self.data + data)[-64:]
        if self._on_data is not None:
            self._on_data(self)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(time.perf_counter())

    @property
    def status(self) -> int:
        """The HTTP status; 0 when none came."""
        return int(self.data[9:12] or 0)

    @property
    def headers(self) -> dict[str, str]:
        """By their names in small letters."""
        lines = self.data.split(b"\r\n\r\n", 1)[0].decode().split("\r\n")[1:]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    @property
    def whole(self) -> bool:
        """A stream that came to its good end."""
        return self.data.rstrip(b"\r\n0").endswith(b"data: [DONE]") and b'"error":{' not in self.data


async def ask(port: int, path: str, body: Mapping[str, Any], **reply: Any) -> Reply:
    """Send a request; the reply comes by itself."""
    made = Reply(**reply)
    await asyncio.get_running_loop().create_connection(lambda: made, "127.0.0.1", port)
    made.transport.write(request_bytes(path, body))
    return made


def ask_and_not_read(port: int, path: str, body: Mapping[str, Any], receive_bytes: int = 4096) -> socket.socket:
    """Send a request over a socket with a small buffer, and leave the reply where it is."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.connect(("127.0.0.1", port))
    sock.sendall(request_bytes(path, body))
    return sock


def texts_of(data: bytes) -> str:
    """The text of a completion's stream."""
    found = []
    for line in data.split(b"\n"):
        if line.startswith(b"data: {"):
            found += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(found)
