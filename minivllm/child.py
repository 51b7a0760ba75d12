"""Child processes: how one is started, and how it and its parent speak.

They share one socket pair that the parent makes and the child inherits: no path, no port, no file mode, and end-of-file means
that the other side is dead. A frame is four bytes of length and a msgpack body of one closed, tagged type; anything else is an
error, never code. (Pickled messages on sockets were the worst faults published for servers of this kind: CVE-2025-32444 and a
dozen siblings.) A child ends when its socket does, so none outlives its parent.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

MAX_FRAME_BYTES = 1 << 28  # far above the longest prompt; a length beyond it means the stream is broken
READ_BYTES = 1 << 18  # at once: some messages of a large step, and not so many that one round of reading takes long
_SOCKET_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 4
_PR_SET_PDEATHSIG = 1
T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    """A message as one frame. Raises ``ValueError`` for one that is too large."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes does not fit into a frame")
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


class FrameReader:
    """Cuts a byte stream into messages of one type. Written by whoever reads the socket."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The messages that are complete with these bytes. Raises ValueError (msgspec's too) when the stream is broken."""
        buffer = self._buffer
        buffer += data
        messages: list[object] = []
        at = 0
        while len(buffer) - at >= _HEADER_BYTES:
            size = int.from_bytes(buffer[at : at + _HEADER_BYTES], "little")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes was announced")
            end = at + _HEADER_BYTES + size
            if len(buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(buffer)[at + _HEADER_BYTES : end]))
            at = end
        del buffer[:at]
        return messages


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection, for a parent and a child."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return ends


def spawn(
    program: Sequence[str], theirs: socket.socket, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run Python with ``program`` and the number of its socket as arguments; ``theirs`` is closed here. ``environment``: its
    variables; None: ours."""
    command = [sys.executable, *program, str(theirs.fileno())]
    with theirs:
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)


async def start_child(
    program: Sequence[str],
) -> tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]:
    """Run Python with ``program`` and the number of its socket as arguments: the process, and our end of the pair."""
    ours, theirs = pair()
    process = spawn(program, theirs)
    reader, writer = await asyncio.open_connection(sock=ours, limit=READ_BYTES)
    return process, reader, writer


def be_child(descriptor: int) -> socket.socket:
    """In the child: its end of the pair. SIGINT and SIGTERM are ignored on purpose: a terminal or a service manager sends them
    to the whole group, and the parent needs its children until it has drained."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    low = os.dup(descriptor)  # a parent with a thousand connections gives a number that ``select`` does not take
    os.close(descriptor)
    return socket.socket(fileno=low)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere the closed socket does it a little later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
