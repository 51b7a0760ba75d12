"""Files of records of steps: all that an engine did, for replay, traces and explanations after the fact.

A recording is gzip around MessagePack. It holds a header and then records; each is a map with the fields' names, and before
each stands its length as a number of its own, so that readers find their way without looking into it.

The records are compressed and written by a thread of its own, a few times a second, and each time all that was written can be
read: of a process that is killed, no more than the last moment is lost. What cannot be written must not disturb who serves: at
the first failure (the disk is full) the log says so, once, and nothing is recorded any more.
"""

import atexit
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from minivllm.errors import BadRecording, InvalidOption
from minivllm.records import StepRecord
from minivllm.types import EngineInfo

FORMAT: Final = "mini-vllm steps"
VERSION: Final = 1
FLUSH_S: Final = 0.25
MOST_WAITING: Final = 4096  # records that the disk is behind
_GZIP: Final = 31  # window bits: zlib's largest, with a header and a trailer of gzip
_LEVEL: Final = 1  # a quarter of the time of the usual level, and files are a fifth larger
_UINT32: Final = 0xCE  # MessagePack's mark of a whole number of 32 bits; the highest byte comes first
_LENGTH: Final = 5  # bytes of that
_CHUNK: Final = 2**18
_MOST_UNPACKED: Final = 2**22  # bytes at a time: a small file may be made to unpack to an enormous one

log = logging.getLogger("minivllm")


class Header(msgspec.Struct, frozen=True):
    """What a recording is of."""

    info: EngineInfo
    model: str
    started_unix_s: float
    started_s: float  # the same moment on time.monotonic(), as the records have it
    format: str = FORMAT
    version: int = VERSION


class Recorder:
    """Writes a recording. Records are added by one thread; its own thread alone writes the file."""

    def __init__(self, path: str | Path, *, flush_s: float = FLUSH_S, most_waiting: int = MOST_WAITING) -> None:
        """Look whether the file can be written; what was there stays until ``begin``. Raises ``InvalidOption``."""
        self._path = Path(path)
        try:
            self._path.open("ab").close()
        except OSError as error:
            raise InvalidOption(
                f"--record-steps {path} cannot be written ({error.strerror}); name a file in a folder that is there and may be "
                "written to."
            ) from None
        self._flush_s, self._most_waiting = flush_s, most_waiting
        self._waiting: deque[bytes] = deque()
        self._encode = msgspec.msgpack.Encoder().encode
        self._ends = threading.Event()
        self._on = False
        self._thread = threading.Thread(target=self._write_all, name="recording of steps", daemon=True)

    def begin(self, info: EngineInfo, model: str) -> None:
        """Write the header; records may come from now on."""
        self._on = True
        self._put(Header(info, model, time.time(), time.monotonic()))
        self._thread.start()
        atexit.register(self.close)  # a daemon thread is not waited for

    @property
    def thread_ident(self) -> int:
        """The thread that writes, for whoever measures it; 0 before ``begin``."""
        return self._thread.ident or 0

    def add(self, record: StepRecord) -> None:
        """Record one more. Never waits and never raises ``OSError``."""
        if not self._on:
            return
        if len(self._waiting) >= self._most_waiting:
            self._stop("the disk does not keep up")
            return
        self._put(record)

    def _put(self, what: Header | StepRecord) -> None:
        body = self._encode(what)
        self._waiting.append(bytes((_UINT32,)) + len(body).to_bytes(4, "big") + body)

    def _stop(self, why: object) -> None:
        """Nothing is recorded any more."""
        if self._on:
            self._on = False
            log.error("the recording of steps to %s ends here: %s", self._path, why)

    def _write_all(self) -> None:
        """The thread: what has come since the last time, as long as it can be written."""
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        try:
            with self._path.open("wb") as file:
                over = False
                while not over:
                    over = self._ends.wait(self._flush_s)
                    bodies = [self._waiting.popleft() for _ in range(len(self._waiting))]
                    if bodies:
                        file.write(packer.compress(b"".join(bodies)) + packer.flush(zlib.Z_SYNC_FLUSH))
                    if over:
                        file.write(packer.flush())
                    file.flush()
        except OSError as error:
            self._stop(error.strerror or error)
            self._waiting.clear()

    def close(self) -> None:
        """Write what has come, and end the file. May be called twice."""
        atexit.unregister(self.close)
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()
        self._on = False


class Recording:
    """A file that is read: the header, then records as often as they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Read the header. Raises ``BadRecording`` for a file that is none, or that cannot be read."""
        self._path = Path(path)
        first = next(self._bodies(), None)
        try:
            self.header = msgspec.msgpack.decode(first or b"", type=Header)
        except msgspec.MsgspecError:
            raise self._damage() from None
        if (self.header.format, self.header.version) != (FORMAT, VERSION):
            raise BadRecording(f"{path} is a recording in another form than this program writes; record it anew.")

    def __iter__(self) -> Iterator[StepRecord]:
        """The records in their order. Raises ``BadRecording`` at damage; an end that is missing is none: whoever wrote it was
        killed, or writes still."""
        decoder = msgspec.msgpack.Decoder(StepRecord)
        bodies = self._bodies()
        next(bodies, None)
        for number, body in enumerate(bodies):
            try:
                yield decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise BadRecording(f"{self._path} is damaged at its record {number}: {error}") from None

    def _bodies(self) -> Iterator[bytes]:
        """What stands between the lengths."""
        held = bytearray()
        for part in self._unpacked():
            held += part
            at = 0
            while len(held) - at > _LENGTH:
                if held[at] != _UINT32:
                    raise self._damage()
                begin = at + _LENGTH
                end = begin + int.from_bytes(held[at + 1 : begin], "big")
                if end > len(held):
                    break
                yield bytes(held[begin:end])
                at = end
            del held[:at]

    def _unpacked(self) -> Iterator[bytes]:
        """What is inside the gzip, a piece at a time."""
        unpacker = zlib.decompressobj(_GZIP)
        try:
            with self._path.open("rb") as file:
                while packed := file.read(_CHUNK):
                    while packed:
                        yield unpacker.decompress(packed, _MOST_UNPACKED)
                        packed = unpacker.unconsumed_tail
        except OSError as error:
            raise BadRecording(f"{self._path} cannot be read: {error.strerror}.") from None
        except zlib.error:
            raise self._damage() from None

    def _damage(self) -> BadRecording:
        return BadRecording(f"{self._path} is no recording of steps, or it is damaged; --record-steps writes one.")
