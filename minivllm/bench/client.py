"""A small HTTP/1.1 client that reads a streamed reply event by event, and says when each came.

Why not a library: the load generator opens thousands of streams and must cost less than the server that it measures, and the
project's run-time dependencies hold an HTTP parser (httptools) but no client. One connection per request, as most users'
programs have; TLS by the standard library.
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import httptools

from minivllm.errors import MiniVLLMError


class RequestFailed(MiniVLLMError):
    """The server could not be reached, broke off, or answered with an error."""


class _Reply:
    """What httptools found so far. Written by its callbacks."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, part: bytes) -> None:
        """Keep a decoded part of the body."""
        self.body += part

    def on_message_complete(self) -> None:
        """The last byte of the reply was read."""
        self.complete = True

    def take_events(self) -> list[str]:
        """Take the data of every whole event out of the body (a blank line ends an event; data lines are joined)."""
        *whole, rest = self.body.replace(b"\r\n", b"\n").split(b"\n\n")
        self.body = bytearray(rest)
        events = []
        for event in whole:
            lines = event.decode("utf-8", "replace").split("\n")
            if data := [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]:
                events.append("\n".join(data))
        return events


def _request_bytes(method: str, url: str, payload: Any, headers: Mapping[str, str]) -> bytes:
    """Write the request's head and JSON body."""
    parts = urlsplit(url)
    body = b"" if payload is None else json.dumps(payload, separators=(",", ":")).encode()
    head = [f"{method} {parts.path or '/'}{'?' + parts.query if parts.query else ''} HTTP/1.1", f"Host: {parts.netloc}"]
    fields = {"Connection": "close", "Content-Length": str(len(body)), "Content-Type": "application/json", **headers}
    head += [f"{name}: {value}" for name, value in fields.items()]
    if any("\r" in line or "\n" in line for line in head):
        raise RequestFailed("A header or the URL holds a line break.")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection to the URL's host."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestFailed(f"{url!r} is not a URL; write it as http://127.0.0.1:8000.")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    return await asyncio.open_connection(parts.hostname, parts.port or (443 if tls else 80), ssl=tls)


async def _read(url: str, payload: Any, headers: Mapping[str, str]) -> AsyncGenerator[tuple[int, _Reply], None]:
    """Send a request (POST with a payload, else GET) and give status and reply after each part that arrives."""
    try:
        reader, writer = await _connect(url)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise RequestFailed(f"No server answers at {url} ({reason}); is it running?") from None
    reply = _Reply()
    parser = httptools.HttpResponseParser(reply)
    try:
        writer.write(_request_bytes("GET" if payload is None else "POST", url, payload, headers))
        await writer.drain()
        while not reply.complete:
            part = await reader.read(65536)
            if not part:
                raise RequestFailed(f"The server at {url} closed the connection in the middle of its answer.")
            parser.feed_data(part)
            yield parser.get_status_code(), reply
    except (OSError, httptools.HttpParserError) as error:
        raise RequestFailed(f"The connection to {url} broke ({error}).") from None
    finally:
        writer.close()


def _refusal(status: int, body: bytes) -> RequestFailed:
    """The server's error as one sentence."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace").strip()
    return RequestFailed(f"The server answered {status}: {message}")


async def fetch_json(url: str, payload: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """GET (or POST ``payload`` to) ``url`` and return the JSON answer. Raises ``RequestFailed``."""
    status, reply = 0, _Reply()
    async for status, reply in _read(url, payload, headers or {}):  # noqa: B007 - the last pair is the whole reply
        pass
    if status >= 400:
        raise _refusal(status, bytes(reply.body))
    try:
        return json.loads(reply.body)
    except ValueError:
        raise RequestFailed(f"The server at {url} did not answer with JSON; is it an OpenAI-compatible server?") from None


async def stream_events(url: str, payload: Any, headers: Mapping[str, str] | None = None) -> AsyncGenerator[str, None]:
    """POST ``payload`` and yield the data of each server-sent event as it arrives. Raises ``RequestFailed``."""
    status, reply = 0, _Reply()
    async with aclosing(_read(url, payload, headers or {})) as parts:
        async for status, reply in parts:
            if status < 400:
                for event in reply.take_events():
                    yield event
    if status >= 400:
        raise _refusal(status, bytes(reply.body))
