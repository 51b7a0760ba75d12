"""The zygote: a process that has everything an engine needs and forks engines of it, so that the next one is there at once.

Most of an engine's start is importing and reading: a second or more of torch alone. Here that is done once. When an engine dies
(a fault of the device, ``kill -9``, the machine's memory), the server asks for another, and a fork has it all in some
milliseconds: modules, compiled kernels and, for a CPU, the weights themselves, whose pages all engines share. For a GPU the
weights' files are mapped, so that they are in memory when the next engine reads them; the device belongs to the engine alone,
since a process that has touched a GPU cannot be forked.

A fork copies only the thread that forks. So nothing here may start one: libraries are held to one thread until the engine has
its own process (``ENVIRONMENT``, ``runner.build.prepare``). One engine lives at a time; the server decides when there is to be
one, and reads of its end on the engine's own socket. The zygote ends when its socket does, and its engine with it.
"""

import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from minivllm import errors
from minivllm.child import FrameReader, be_child, die_with_parent, encode
from minivllm.config import Config
from minivllm.engine.ipc import Failed, Hatch, Kill, Prepare, ToZygote
from minivllm.engine.process import EngineServer, Steps
from minivllm.logs import set_up_logging

Build = Callable[[Config], Steps]
Prepared = Callable[[Config], Build]

LAST_WORDS_S: Final = 0.5  # for an engine that hangs to write where it does
STACKS: Final = signal.SIGUSR1  # an engine that gets it writes where each of its threads is
ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would start when it is imported; nothing here uses them
    }
)

log = logging.getLogger("minivllm")


class Zygote:
    """Written by the zygote's only thread."""

    def __init__(self, control: socket.socket, prepare: Prepared) -> None:
        self._control = control
        self._prepare = prepare
        self._frames = FrameReader(ToZygote)  # type: ignore[arg-type]
        self._descriptors: deque[int] = deque()  # of sockets that came beside messages
        self._engine: int | None = None  # its process id, until its end was read

    def run(self) -> int:
        """Serve until the server closes. Returns the exit code: of an engine that was forked, in that process."""
        wake, alarm = socket.socketpair()
        for end in (wake, alarm):
            end.setblocking(False)
        signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken
        build: Build | None = None
        failure: errors.StartupError | None = None
        while messages := self._receive(wake):
            for message in messages:
                if isinstance(message, Prepare):
                    set_up_logging(message.config.server.log_level, message.config.server.log_format, "engine")
                    try:
                        build = self._prepare(message.config)
                    except errors.StartupError as error:
                        failure = error
                    gc.collect()
                    gc.freeze()  # or the first collection in an engine would touch, and so copy, every page with objects
                    gc.collect()  # counts how little is left, by which later collections are timed
                elif isinstance(message, Hatch):
                    with socket.socket(fileno=self._descriptors.popleft()) as engine:
                        if failure is not None:
                            engine.sendall(encode(Failed(type(failure).__name__, str(failure))))
                            return failure.exit_code
                        if build is None:
                            raise RuntimeError("an engine was wanted before it was said of which model")
                        if (code := self._hatch(engine, build, (wake, alarm))) is not None:
                            return code
                elif isinstance(message, Kill):
                    self._kill()
        self._bury(block=True)
        return 0

    def _receive(self, wake: socket.socket) -> list[object]:
        """Wait for messages, and for engines to end meanwhile. Empty: the server has closed."""
        while True:
            ready, _, _ = select.select([self._control, wake], [], [])
            if wake in ready:
                wake.recv(4096)
                self._bury()
            if self._control in ready:
                data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, 8)
                self._descriptors.extend(descriptors)
                if not data:
                    return []
                if messages := self._frames.feed(data):
                    return messages

    def _hatch(self, sock: socket.socket, build: Build, ours: tuple[socket.socket, ...]) -> int | None:
        """Fork an engine. None: this is the zygote still; in the engine, its exit code when it has ended."""
        self._bury(block=True)  # of an engine that was killed a moment ago
        if (threads := num_threads()) > 1:
            log.warning("the engine is forked from a process with %d threads; it may hang", threads)
        spare_bytes = private_bytes()
        self._engine = os.fork()
        if self._engine:
            return None
        self._engine = None
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._control, *ours):
            end.close()
        faulthandler.register(STACKS, all_threads=True)
        return EngineServer(sock, build, spare_bytes).run()

    def _kill(self) -> None:
        """End the engine after its last words."""
        if self._engine is None:
            return
        os.kill(self._engine, STACKS)
        time.sleep(LAST_WORDS_S)
        os.kill(self._engine, signal.SIGKILL)
        self._bury(block=True)

    def _bury(self, *, block: bool = False) -> None:
        """Read how the engine ended, if it did; with ``block``, end it first if it did not."""
        if self._engine is None:
            return
        pid, status = os.waitpid(self._engine, os.WNOHANG)
        due_s = time.monotonic() + LAST_WORDS_S / 2
        while block and not pid and time.monotonic() < due_s:  # it may be about to end, with an exit code of its own
            time.sleep(0.005)
            pid, status = os.waitpid(self._engine, os.WNOHANG)
        if block and not pid:
            os.kill(self._engine, signal.SIGKILL)
            pid, status = os.waitpid(self._engine, 0)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                log.error("the engine process %d %s", pid, how)
            self._engine = None


def num_threads() -> int:
    """Threads of this process; 1 where there is no /proc."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1


def private_bytes() -> int:
    """Memory that this process has to itself (not files it maps); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def be_zygote(descriptor: int, prepare: Prepared) -> int:
    """Be the child: fork engines of what ``prepare`` has made ready, as the server at the other end of an inherited socket
    wants them. Returns the exit code."""
    return Zygote(be_child(descriptor), prepare).run()


def serve_steps(descriptor: int, build: Build) -> int:
    """The same for something that needs no preparation."""
    return be_zygote(descriptor, lambda _: build)


def _prepare_engine(config: Config) -> Build:
    """The real engine; torch is imported here, in the child only."""
    from minivllm.engine.build import prepare_engine

    return prepare_engine(config)


def main() -> int:
    """Entry of the child: ``python -m minivllm.engine.zygote FD``."""
    code = be_zygote(int(sys.argv[1]), _prepare_engine)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # an engine's threads may be at work still, and nobody waits for them


if __name__ == "__main__":
    main()
