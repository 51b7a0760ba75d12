"""A server under test: ``mini-vllm serve`` as a process whose engine client writes down what a benchmark wants to know.

    python -m benchmarks.reliability.watched --log FILE [--token-s 1.0] [mini-vllm serve options]      (benchmarks start this)

For every sequence that is aborted, the log says how many steps of the engine ran, wholly or in part, between the server's wish
and the moment at which its blocks were free, and how far the sequence was. With ``--token-s`` there is no model: every request
gets a token in so many seconds, behind the same seam.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.request import urlopen

from minivllm.config import Config
from minivllm.records import EngineOutput, StepRecord
from minivllm.types import EngineInfo, GenerateRequest, TokenEvent

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0
MOST_REMEMBERED = 1000  # aborts whose end is awaited

# ------------------------------------------------------------------------------------------------------ inside the server


class Watched:
    """An ``EngineClient`` that writes down when aborted sequences are gone. Written by the server's event loop."""

    def __init__(self, client: Any, log: TextIO) -> None:
        self._client = client
        self._log = log
        self._steps: deque[tuple[float, float]] = deque(maxlen=1000)  # when each of the last was planned and collected
        self._aborted: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the client's."""
        return getattr(self._client, name)

    def abort(self, ids: Sequence[str]) -> None:
        """Remember when it was asked for."""
        self._aborted |= dict.fromkeys(ids, time.monotonic())
        while len(self._aborted) > MOST_REMEMBERED:  # of those that had ended already, nothing more will be heard
            del self._aborted[next(iter(self._aborted))]
        self._client.abort(ids)

    async def outputs(self) -> EngineOutput:
        """The engine's next message. The engine's clock is that of the machine."""
        output = await self._client.outputs()
        record = output.record
        if record is not None:
            if record.rows:
                self._steps.append((record.scheduled_s, record.collected_s))
            for finished in record.finished:
                then_s = self._aborted.pop(finished.id, None)
                if finished.reason == "abort" and then_s is not None:
                    steps = sum(collected > then_s and planned < finished.finished_s for planned, collected in self._steps)
                    begun = "prefill" if finished.first_token_s is None else "decode"
                    place = "queued" if finished.scheduled_s is None else begun
                    line = {"place": place, "steps": steps, "ms": 1e3 * (finished.finished_s - then_s)}
                    self._log.write(json.dumps(line) + "\n")
        return output


class TokenSource:
    """Steps without a model: every request gets a token each ``token_s``. Driven by the engine's child."""

    def __init__(self, config: Config, token_s: float) -> None:
        self.info = EngineInfo(
            8192, config.scheduler.max_num_seqs, 8192, 16, 2**20, 4096, (), "cpu", "none", 0, 0, 0
        )  # fmt: skip
        self._token_s = token_s
        self._due: dict[str, list[float]] = {}  # in the order of their next token: when, tokens so far, tokens in all
        self._step = 0

    @property
    def has_work(self) -> bool:
        """True while anybody wants a token."""
        return bool(self._due)

    def add(self, request: GenerateRequest) -> None:
        """Its first token comes at once."""
        self._due = {request.id: [0.0, 0, request.sampling.max_tokens or 1], **self._due}

    def abort(self, ids: Iterable[str]) -> None:
        """No more for these."""
        for name in ids:
            self._due.pop(name, None)

    def step(self) -> EngineOutput | None:
        """A token for everybody who is due; a tick of 10 ms."""
        time.sleep(0.01)
        now, events = time.monotonic(), []
        for name, state in list(self._due.items()):
            if state[0] > now:
                break
            del self._due[name]
            state[0] = max(state[0] + self._token_s, now) if state[0] else now + self._token_s
            state[1] += 1
            done = state[1] >= state[2]
            events.append(TokenEvent(name, (1000 + self._step % 1000,), "length" if done else None))
            if not done:
                self._due[name] = state
        self._step += 1
        if not events:
            return None
        record = StepRecord(
            self._step, now, now, now, now, (), len(self._due), 0, (), "", 9, 9, 0, 0, 0, 0, 0, len(events), (), (), ()
        )
        return EngineOutput(tuple(events), record)

    def watch(self, announce: Any) -> None:
        """No step is worth an announcement."""

    def prepare_more(self) -> bool:
        """There is nothing to prepare."""
        return False


async def _start(config: Config, folder: Path, found: argparse.Namespace) -> Any:
    """The ``AsyncLLM`` on the engine that is asked for."""
    if found.token_s is None:
        from minivllm.cli.start import start_llm

        return await start_llm(config, folder)
    from minivllm.async_llm import AsyncLLM
    from minivllm.door import tokenizer_folder
    from minivllm.engine.supervisor import start_engine
    from minivllm.observe.metrics import metrics_for
    from minivllm.text.tokenizer import load_tokenizer

    client = await start_engine(config, ("-m", __spec__.name if __spec__ else "", "--token-s", str(found.token_s), "--engine"))
    return AsyncLLM(client, load_tokenizer(tokenizer_folder(config, folder)), config, metrics_for(config, client.info))


async def _serve(config: Config, found: argparse.Namespace) -> int:
    from minivllm.cli.serve import spare_the_collector
    from minivllm.door import locate
    from minivllm.server.application import create_app
    from minivllm.server.http import serve

    config, folder = locate(config)
    llm = await _start(config, folder, found)
    with Path(found.log).open("w", buffering=1, encoding="utf-8") as log:
        llm._client = Watched(llm._client, log)
        try:
            spare_the_collector()
            return await serve(create_app(llm, config), config, llm, lambda s: print(f"Serving on {s.url}", flush=True))
        finally:
            await llm.close()


def main() -> int:
    """Be the server, or the engine behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--token-s", type=float)
    parser.add_argument("--engine", type=int)
    found, rest = parser.parse_known_args()
    if found.engine is not None:
        from minivllm.engine.zygote import serve_steps

        return serve_steps(found.engine, lambda config: TokenSource(config, found.token_s))  # type: ignore[arg-type]
    from minivllm.cli.options import ALL_SECTIONS, Parser, add_config, add_model_argument, read_config
    from minivllm.cli.serve import loop_factory, raise_open_files_limit

    options = Parser("serve", "Serve, watched.", "[options]")
    add_model_argument(options)
    add_config(options, ALL_SECTIONS)
    raise_open_files_limit()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(read_config(options.read(rest)), found))


# ----------------------------------------------------------------------------------------------------- outside of the server


class Server:
    """A running server. Written by the benchmark that started it."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process = process
        self.log = log
        self.lines: list[str] = []
        ready = threading.Event()

        def read() -> None:
            for line in process.stdout or ():
                self.lines.append(line)
                if line.startswith("Serving on "):
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        ready.wait(START_TIMEOUT_S)
        url = next((found[1] for line in self.lines if (found := re.match(r"Serving on (http://\S+)", line))), None)
        if url is None:
            raise RuntimeError("the server did not start:\n" + "".join(self.lines))
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])

    def metrics(self) -> dict[str, Any]:
        """GET /metrics."""
        with urlopen(self.url + "/metrics", timeout=60) as reply:
            return dict(json.load(reply))

    def memory_bytes(self) -> int:
        """Memory of the server process that is its own: anonymous pages, resident or swapped out."""
        return own_memory_bytes(self.process.pid)

    def wait_for(self, seconds: float = 60.0, **levels: float) -> dict[str, Any]:
        """Wait until metrics are as given. Raises ``RuntimeError`` when they are not in time."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if all(metrics[name] == level for name, level in levels.items()):
                return metrics
            if time.monotonic() > deadline:
                raise RuntimeError(f"{levels} did not come about: {metrics}")
            time.sleep(0.05)

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Wait until nothing is open and no block is held."""
        self.wait_for(seconds, active_requests=0, waiting_requests=0, paused_requests=0, kv_cache_usage=0)


def own_memory_bytes(pid: int) -> int:
    """RssAnon plus VmSwap of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return sum(1024 * int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))


@contextmanager
def serve(*options: str, ends_with: int = 0) -> Iterator[Server]:
    """A watched server while the block runs; afterwards it must end as it should."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.reliability.watched", "--log", str(log), "--port", "0", *options]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        try:
            yield Server(process, log)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            if (code := process.wait(60)) != ends_with:
                raise RuntimeError(f"the server ended with {code}")
        finally:
            process.kill()
            process.wait()


def verdict(title: str, rows: Sequence[tuple[str, object]], broken: Sequence[str]) -> int:
    """Print a table and what is broken; the exit code."""
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    for sentence in broken:
        print(f"BROKEN: {sentence}")
    print(json.dumps({"benchmark": title, "broken": list(broken), **{name: str(value) for name, value in rows}}), flush=True)
    return 1 if broken else 0


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are not above."""
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")


if __name__ == "__main__":
    sys.exit(main())
