"""The real server as a process, as a user starts it."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0
_REPO = Path(__file__).resolve().parents[2]


class LiveServer:
    """A running ``mini-vllm serve``. Written by the test that started it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._wait_for_url()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._news.put(line)
        self._news.put(None)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            line = self._news.get(timeout=START_TIMEOUT_S)
            if line is None:
                raise AssertionError("the server ended at start:\n" + "".join(self.lines))
            if found := re.search(r"Serving .* on (http://\S+)", line):
                return found.group(1)
        raise AssertionError("the server did not come up")

    @property
    def zygote_pid(self) -> int:
        """The process that engines are forked from, among the server's children."""
        (zygote,) = [pid for pid in children(self.process.pid) if "zygote" in Path(f"/proc/{pid}/cmdline").read_text()]
        return zygote

    @property
    def engine_pid(self) -> int:
        """The engine process."""
        (engine,) = children(self.zygote_pid)
        return engine

    def metrics(self) -> dict[str, float]:
        return dict(httpx.get(self.url + "/metrics", timeout=30).json())

    def wait_idle(self, timeout_s: float = 30.0) -> dict[str, float]:
        """Wait until nothing is open and no block is referenced."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            metrics = self.metrics()
            if metrics["active_requests"] == metrics["waiting_requests"] == metrics["kv_cache_usage"] == 0:
                return metrics
            time.sleep(0.05)
        raise AssertionError(f"the server is not idle: {self.metrics()}")

    def stop(self) -> int:
        """SIGTERM, as a service manager does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def children(pid: int) -> list[int]:
    """The children of a process."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def command(*args: str) -> list[str]:
    """The command line of a sub-command."""
    return [sys.executable, "-m", "minivllm", *args]


@contextmanager
def serve(*args: str) -> Iterator[LiveServer]:
    """Serve on a free port while the block runs."""
    process = subprocess.Popen(
        command("serve", "--port", "0", "--num-threads", "1", *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=_REPO,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield LiveServer(process)
    finally:
        process.kill()
        process.wait()
