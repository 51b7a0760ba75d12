"""What the server and the engine process say to each other, and how it is framed.

One socket pair, made by the server and inherited by the engine: no path, no port, no file mode, and end-of-file means that
the other side is dead. A frame is four bytes of length and a msgpack body of one closed, tagged type; anything else is an
error, never code. (Pickled messages on sockets were the worst faults published for servers of this kind: CVE-2025-32444 and a
dozen siblings.)
"""

from typing import TypeVar

import msgspec

from minivllm.config import Config
from minivllm.types import EngineInfo, EngineOutput, GenerateRequest

MAX_FRAME_BYTES = 1 << 28  # far above the longest prompt; a length beyond it means the stream is broken
_HEADER_BYTES = 4


class Start(msgspec.Struct, frozen=True, gc=False, tag="start"):
    """First word to the engine: load this."""

    config: Config


class Add(msgspec.Struct, frozen=True, gc=False, tag="add"):
    """A new request."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, gc=False, tag="abort"):
    """These requests are not wanted any more."""

    ids: tuple[str, ...]


class Stop(msgspec.Struct, frozen=True, gc=False, tag="stop"):
    """End now."""


class Failed(msgspec.Struct, frozen=True, gc=False, tag="failed"):
    """The engine could not start; ``kind`` names the class in ``errors.py``."""

    kind: str
    message: str


ToEngine = Start | Add | Abort | Stop
FromEngine = EngineInfo | EngineOutput | Failed
T = TypeVar("T")


def encode(message: ToEngine | FromEngine) -> bytes:
    """A message as one frame."""
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
