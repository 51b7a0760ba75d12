"""The listening sockets: how they are bound, and how connections are taken from them.

An event loop's own server takes all connections that wait before it looks at any, so a crowd at the door would use up the files
that the process may open, and taking the next one would fail over and over. Here they are taken some at a time, those beyond
what can be told anything are closed at once, and when there is no file left all the same, nothing is tried for a moment.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

from minivllm.errors import PortInUse

AT_ONCE: Final = 64  # connections taken before the loop does something else
BACKLOG: Final = 2048
REST_S: Final = 0.5  # when no file is left
SEND_BUFFER_BYTES: Final = 32 * 2**10  # what the kernel may hold of a reply that is not read; Linux takes twice that
logger = logging.getLogger("minivllm.server")


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, not listening yet; all have the same port. Raises ``PortInUse``."""
    bound: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit this
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind((address[0], bound[0].getsockname()[1] or port, *address[2:]) if len(bound) > 1 else address)
    except (OSError, OverflowError) as error:
        for sock in bound:
            sock.close()
        reasons = {errno.EADDRINUSE: "it is in use", errno.EACCES: "it is not allowed"}
        why = reasons.get(getattr(error, "errno", None) or 0, "the address is not one of this machine's")
        raise PortInUse(f"Cannot listen on {host}:{port}: {why}; choose another --port or --host.") from None
    return bound


class Door:
    """Takes connections from listening sockets. Written by the server's event loop."""

    def __init__(
        self, sockets: list[socket.socket], connect: Callable[[], asyncio.Protocol], num_open: Callable[[], int], most: int
    ) -> None:
        """``most``: connections beyond which nobody is told anything; ``num_open`` counts them."""
        self._sockets = sockets
        self._connect = connect
        self._num_open = num_open
        self._most = most
        self._arriving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.listen(BACKLOG)
            self._loop.add_reader(sock, self._take, sock)

    @property
    def port(self) -> int:
        """The port that is listened on, also where 0 was asked for."""
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Take no more."""
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets = []

    def _take(self, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.warning("No connection can be taken for a moment: %s", error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(REST_S, self._again, listener)
                return
            if self._num_open() + len(self._arriving) >= self._most:
                sock.close()
                continue
            sock.setblocking(False)
            task = self._loop.create_task(self._serve(sock))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    def _again(self, listener: socket.socket) -> None:
        if listener in self._sockets:
            self._loop.add_reader(listener, self._take, listener)

    async def _serve(self, sock: socket.socket) -> None:
        """Hand a connection to its protocol. It may have gone already."""
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(self._connect, sock)
