"""Messages of whole numbers between two processes that answer each other within microseconds.

A message is a number of int32 words and these words, over a stream socket. Who expects an answer soon looks for it again and
again for a while before going to sleep: waking a sleeping process takes longer than many a message is worth. In between it
lets others have the core, who may be the very ones that it waits for; and where others want it, it sleeps at once, because
those who sleep are let in before those who were busy.
"""

import os
import select
import socket
import time
from array import array
from collections.abc import Sequence

_WORD_BYTES = 4
_READ_BYTES = 1 << 16
_CROWDED_S = 1e-4  # who looks less often than this shares its core with others


class NumberSocket:
    """One side. Written by one thread."""

    def __init__(self, sock: socket.socket, spin_s: float) -> None:
        """``spin_s``: how long to look for a message before sleeping until one comes."""
        self._sock, self._spin_s = sock, spin_s
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, numbers: Sequence[int]) -> None:
        """Raises ``OSError`` when the other side has gone."""
        self._sock.sendall(array("i", (len(numbers), *numbers)))

    def receive(self, within_s: float | None = None) -> "array[int]":
        """The next message. Raises ``EOFError`` when the other side has gone, ``TimeoutError``."""
        buffer = self._buffer
        while (size := self._size()) > len(buffer):
            if not (read := self._read(within_s)):
                raise EOFError
            buffer += read
        numbers = array("i", bytes(buffer[_WORD_BYTES:size]))
        del buffer[:size]
        return numbers

    def _size(self) -> int:
        """Bytes of the message that the buffer begins with, as far as that is known."""
        words = int.from_bytes(self._buffer[:_WORD_BYTES], "little") if len(self._buffer) >= _WORD_BYTES else 0
        return _WORD_BYTES * (1 + words)

    def _read(self, within_s: float | None) -> bytes:
        last_s = time.perf_counter()
        sleeps_s = last_s + self._spin_s
        while True:
            try:
                return self._sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if (now_s := time.perf_counter()) < sleeps_s and now_s - last_s < _CROWDED_S:
                    last_s = now_s
                    os.sched_yield()
                    continue
            except ConnectionError:
                return b""
            if not self._poll.poll(None if within_s is None else within_s * 1e3):
                raise TimeoutError
            sleeps_s = 0.0

    def close(self) -> None:
        """The other side reads the end."""
        self._sock.close()
