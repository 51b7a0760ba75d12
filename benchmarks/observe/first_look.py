"""A new user's way: from a clone of this repository to prompts that share their steps, seen on the page.

    python -m benchmarks.observe.first_look

Does what README.md says, in an empty folder and with a browser without a window: clone, ``make serve``, open the address, press
"Send 8 at once". Each line tells when that was done. The promise: two prompts in one step within two minutes.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks.observe.browser import chromium, watch

MOST_S = 120.0
REPO = Path(__file__).resolve().parents[2]


class Clock:
    """Seconds since the beginning, told with each thing that is done."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def tell(self, what: str) -> float:
        """Print and return them."""
        now_s = time.monotonic() - self._began_s
        print(f"{now_s:6.1f} s  {what}", flush=True)
        return now_s


def ready(url: str, made: subprocess.Popen[bytes]) -> None:
    """Wait for the server. Raises ``RuntimeError`` if it ended."""
    while made.poll() is None:
        try:
            with urlopen(f"{url}/ready", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"make serve ended with exit code {made.returncode}")


def look(url: str, clock: Clock) -> float:
    """Open the page and send eight; when two of them were in one step, in seconds."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        wrong = watch(page)
        page.goto(url)
        clock.tell("the page is open")
        page.click("#eight")

        def shown(rows: int) -> None:
            while not page.evaluate(f"window.glass.records.some((r) => r.rows.length >= {rows})"):
                page.wait_for_timeout(20)

        shown(2)
        seen_s = clock.tell("two prompts in one step")
        shown(8)
        clock.tell("eight prompts in one step")
    for line in wrong:
        print("BROKEN:", line)
    return seen_s if not wrong else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Go that way; the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as empty:
        clock, url = Clock(), f"http://127.0.0.1:{port}"
        subprocess.run(["git", "clone", "--quiet", str(REPO), f"{empty}/mini-vllm"], check=True)
        clock.tell("cloned")
        command = ["make", "serve", f"ARGS=--port {port}"]
        made = subprocess.Popen(command, cwd=f"{empty}/mini-vllm", start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            ready(url, made)
            clock.tell("installed and serving")
            seen_s = look(url, clock)
        finally:
            os.killpg(made.pid, signal.SIGTERM)
            made.wait()
    return 0 if seen_s <= MOST_S else 1


if __name__ == "__main__":
    sys.exit(main())
