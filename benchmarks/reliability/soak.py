"""An hour of mixed traffic with aborts: does anything of it stay, in the cache, in memory, in the tables of open files?

    python -m benchmarks.reliability.soak [--minutes 60] [--warm-up-minutes 10] [--log FILE]

A real server with the bundled model. Rounds of requests of every kind, a quarter of whose clients leave at a random moment, are
followed by idle moments. At each of these no block may be held, the bytes of a canary must be those of the first round, and
the memory (anonymous pages, resident or swapped out) and the open files of every process of the server are taken down. After
the warm-up open files must not exceed those of the warm-up's idle moments, and memory must not grow: the 95 % interval of its
slope holds 0 or ends below 1 MiB/h. A sample follows another by twenty seconds, so they are nearly independent; the interval
is widened by what correlation of neighbours is left. Tables with bounds are filled first, so that from then on one entry takes
the place of another: compiled grammars (so many that the heap, too, has the holes it comes to have), words that the tokenizer
knows, texts of tokens. The pace is such that client and server use ``--load`` cores.

``--log`` gets a JSON line at each idle moment. SIGINT or SIGTERM end the run early, with a verdict over what there is.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TextIO

from benchmarks.reliability.raw_client import Reply, ask
from benchmarks.reliability.soak_requests import CANARY, Drawn, Kinds, every_token
from benchmarks.reliability.watched import Server, own_memory_bytes, serve, verdict

OPTIONS: Final = ("--num-threads", "1", "--max-num-seqs", "8", "--max-num-batched-tokens", "256",
                  "--num-gpu-blocks-override", "96", "--batch-invariant")  # fmt: skip
MOST_GROWTH: Final = 2**20  # bytes an hour
LEAST_SAMPLES: Final = 10  # for a slope
REPLY_S: Final = 120.0
TICK_S: Final = os.sysconf("SC_CLK_TCK")
ROLES: Final = {"watched": "server", "zygote": "zygote", "helper_process": "helper", "guide_process": "guide"}


@dataclass(frozen=True)
class Sizes:
    """How long, and how much at once."""

    minutes: float = 60.0
    warm_up_minutes: float = 10.0
    round_s: tuple[float, float] = (15.0, 25.0)
    concurrency: int = 16
    load: float = 0.5
    grammars: int = 3000  # to begin with
    words: int = 20_000  # likewise; the tokenizers library keeps 10,000
    seed: int = 0


@dataclass
class Found:
    """What was seen. Written by ``soak``."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- processes


def processes(pid: int, parent: str = "") -> Iterator[tuple[str, int]]:
    """A process and all that descend from it, each with its name."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    module = next((after for word, after in pairwise(words) if word == "-m"), "other")
    role = "engine" if parent == "zygote" else ROLES.get(module.rsplit(".", 1)[-1], module)
    yield f"{role} {pid}", pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes(int(child), role)


def open_files(pid: int) -> int:
    """How many descriptors a process holds."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def cpu_s(pids: Sequence[int]) -> float:
    """Time on cores so far, of these and of this process."""
    spent = time.process_time()
    for pid in pids:
        numbers = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        spent += (int(numbers[11]) + int(numbers[12])) / TICK_S
    return spent


# --------------------------------------------------------------------------------------------------------------- traffic


def _good(reply: Reply, streamed: bool) -> bool:
    if streamed:
        return reply.status == 200 and reply.whole
    head, _, body = reply.data.partition(b"\r\n\r\n")
    return reply.status == 200 and len(body) == int(reply.headers.get("content-length", -1)) and b'"error"' not in head


async def client(port: int, drawn: Drawn, rng: random.Random, found: Found) -> None:
    """One request, read to its end or left."""
    kind, path, body, status = drawn
    leaves_after_s = (0.0 if rng.random() < 0.3 else rng.expovariate(1 / 0.5)) if rng.random() < 0.25 else None
    reply = await ask(port, path, body)
    await asyncio.wait({reply.closed}, timeout=REPLY_S if leaves_after_s is None else leaves_after_s)
    if not reply.closed.done():
        (reply.transport.abort if rng.random() < 0.5 else reply.transport.close)()
        found.kinds["left"] += 1
        if leaves_after_s is None:
            found.broken.append(f"no whole reply to {kind} in {REPLY_S} s: {json.dumps(body)[:300]}")
        return
    found.kinds[kind] += 1
    good = _good(reply, bool(body.get("stream"))) if status == 200 else reply.status == status
    if not good:
        found.broken.append(f"{kind} was answered {reply.status}: {json.dumps(body)[:300]} -> {reply.data[-300:]!r}")


async def traffic(server: Server, sizes: Sizes, kinds: Kinds, found: Found, stop: asyncio.Event) -> None:
    """A round: bursts, with such pauses between them that the load is as wanted."""
    rng = kinds.rng
    began_s, lasts_s = time.monotonic(), rng.uniform(*sizes.round_s)
    pids = [pid for _, pid in processes(server.process.pid)]
    before_s = cpu_s(pids)
    while time.monotonic() - began_s < lasts_s and not stop.is_set():
        count = rng.randint(sizes.concurrency // 2, sizes.concurrency * 3 // 2)
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(client(server.port, kinds.draw(), rng, found))
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.expovariate(1 / 0.1))
        while cpu_s(pids) - before_s > sizes.load * (time.monotonic() - began_s) and not stop.is_set():
            await asyncio.sleep(0.1)


async def fill(server: Server, sizes: Sizes, kinds: Kinds, found: Found, stop: asyncio.Event) -> None:
    """Ask for every token's text, for so many words and so many grammars."""
    for drawn in (every_token(), *[kinds.new_words(1000) for _ in range(sizes.words // 1000)]):
        await client(server.port, drawn, kinds.rng, found)

    async def worker() -> None:
        while found.kinds["grammars to begin with"] < sizes.grammars and not stop.is_set():
            found.kinds["grammars to begin with"] += 1
            await client(server.port, kinds.new_grammar(), kinds.rng, found)

    await asyncio.gather(*[worker() for _ in range(sizes.concurrency)])


def unchunked(data: bytes) -> bytes:
    """A body whose pieces are put together; how many events a piece holds is a matter of time."""
    found = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        data = rest[int(size, 16) + 2 :]
    return b"".join(found)


def told_by(stream: bytes) -> bytes:
    """All that a chat's stream told, put together: how many tokens an event holds is a matter of time."""
    text, logprobs, ends = "", [], []
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text += choice["delta"].get("content", "")
            logprobs += (choice["logprobs"] or {}).get("content", [])
            ends.append(choice["finish_reason"])
    return json.dumps([text, logprobs, ends[-1:], b"[DONE]" in stream]).encode()


async def canary(server: Server) -> list[bytes]:
    """Its bytes, but for names and times; a stream's, but for where one event ends and the next begins."""
    bodies = []
    for path, body in CANARY:
        reply = await ask(server.port, path, body)
        async with asyncio.timeout(REPLY_S):
            await reply.closed
        data = reply.data.partition(b"\r\n\r\n")[2]
        if body.get("stream"):
            data = told_by(unchunked(data))
        bodies.append(re.sub(rb'"id":"[^"]*"|"created":\d+', b"", data))
    return bodies


def _first_difference(told: Sequence[bytes], expected: Sequence[bytes]) -> str:
    for a, b in zip(told, expected, strict=True):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"{a[max(at - 60, 0) : at + 60]!r} is not {b[max(at - 60, 0) : at + 60]!r}"
    return ""


async def idle_moment(server: Server, found: Found, expected: list[bytes]) -> dict[str, Any]:
    """Wait until all is quiet; what is there then."""
    try:
        await asyncio.to_thread(server.wait_idle, 120.0)
    except RuntimeError as error:
        found.broken.append(f"not idle after a round: {error}")
    told = await canary(server)
    if told != expected:
        found.broken.append(f"the canary's bytes differ from those of the first round: {_first_difference(told, expected)}")
    metrics = await asyncio.to_thread(server.metrics)
    if metrics["engine_restarts"]:
        found.broken.append(f"{metrics['engine_restarts']} engines died")
    files: dict[str, int] = {}
    for _ in range(6):  # the last questions' connections need a moment to go, and processes to give back what they freed
        await asyncio.sleep(0.5)
        for name, pid in processes(server.process.pid):
            files[name] = min(open_files(pid), files.get(name, sys.maxsize))
    memory = {name: own_memory_bytes(pid) for name, pid in processes(server.process.pid)}
    levels = {name: metrics[name] for name in ("active_requests", "waiting_requests", "paused_requests", "kv_cache_usage")}
    totals = {name: metrics[name] for name in ("total_tokens_generated", "total_preemptions", "total_requests")}
    if any(levels.values()):
        found.broken.append(f"held while idle: {levels}")
    return {"canary": told == expected, **levels, **totals, "memory_bytes": memory, "open_files": files}


async def soak(server: Server, sizes: Sizes, found: Found, log: TextIO | None = None) -> None:
    """Rounds and idle moments until the time is over or a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kinds = Kinds(random.Random(sizes.seed))
    began_s, expected = time.monotonic(), await canary(server)
    await fill(server, sizes, kinds, found, stop)
    while time.monotonic() - began_s < 60 * sizes.minutes and not stop.is_set():
        round_s, before_s = time.monotonic(), cpu_s([pid for _, pid in processes(server.process.pid)])
        await traffic(server, sizes, kinds, found, stop)
        sample = await idle_moment(server, found, expected)
        spent_s = cpu_s([pid for _, pid in processes(server.process.pid)]) - before_s
        now_s = time.monotonic()
        sample |= {"t_s": now_s - began_s, "load": spent_s / (now_s - round_s)}
        sample |= {"kinds": dict(found.kinds), "broken": found.broken[:3]}
        found.samples.append(sample)
        if log is not None:
            log.write(json.dumps(sample) + "\n")
            log.flush()
        if len(found.broken) > 20:
            break


# --------------------------------------------------------------------------------------------------------------- verdict


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope and the half width of its 95 % interval, widened for correlated neighbours."""
    n = len(times)
    mean_t, mean_v = sum(times) / n, sum(values) / n
    spread = sum((t - mean_t) ** 2 for t in times)
    found = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread
    rest = [v - mean_v - found * (t - mean_t) for t, v in zip(times, values, strict=True)]
    squares = sum(r * r for r in rest)
    near = sum(a * b for a, b in pairwise(rest)) / squares if squares else 0.0
    near = min(max(near, 0.0), 0.95)
    student = 1.96 + 2.5 / (n - 2)  # the 97.5 % quantile of Student's t, a hair above it
    return found, student * math.sqrt(squares / (n - 2) / spread * (1 + near) / (1 - near))


def judge_process(name: str, samples: Sequence[dict[str, Any]], warm_up_s: float) -> tuple[str, list[str]]:
    """What is to be said of a process, and what is broken."""
    broken = []
    before = [s for s in samples if s["t_s"] < warm_up_s] or samples[:1]
    after = [s for s in samples if s["t_s"] >= warm_up_s]
    files_before = max((s["open_files"].get(name, 0) for s in before), default=0)
    files_after = max((s["open_files"].get(name, 0) for s in after), default=0)
    if after and files_after > files_before:
        broken.append(f"{name} has {files_after} open files, {files_before} in the warm-up")
    if not all(name in s["memory_bytes"] for s in after):
        broken.append(f"{name} did not live through all of the time after the warm-up")
    points = [(s["t_s"] / 3600, s["memory_bytes"][name]) for s in after if name in s["memory_bytes"]]
    text = f"{files_before} / {files_after}"
    if len(points) >= LEAST_SAMPLES:
        found, half = slope(*zip(*points, strict=True))
        text += f"; {points[-1][1] / 2**20:.1f} MiB, {found / 2**20:+.3f} ± {half / 2**20:.3f} MiB/h"
        if found - half > 0 and found + half > MOST_GROWTH:
            broken.append(f"{name} grows by {found / 2**20:.2f} ± {half / 2**20:.2f} MiB/h")
    return text, broken


def judge(found: Found, warm_up_s: float) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    samples, broken = found.samples, list(found.broken)
    if not samples:
        return [("idle moments", 0)], [*broken, "there was no idle moment"]
    last = samples[-1]
    rows: list[tuple[str, object]] = [
        ("minutes", f"{last['t_s'] / 60:.1f}"),
        ("idle moments, of them after the warm-up", f"{len(samples)}, {sum(s['t_s'] >= warm_up_s for s in samples)}"),
        ("idle moments with blocks held", sum(s["kv_cache_usage"] > 0 for s in samples)),
        ("idle moments with the canary's bytes", sum(s["canary"] for s in samples)),
        ("requests by kind", dict(sorted(last["kinds"].items()))),
        ("sequences by their ends", last["total_requests"]),
        ("tokens generated, preemptions", f"{last['total_tokens_generated']}, {last['total_preemptions']}"),
        ("load, cores", f"{sum(s['load'] for s in samples) / len(samples):.2f}"),
    ]
    for name in sorted({name for sample in samples for name in sample["memory_bytes"]}):
        text, wrong = judge_process(name, samples, warm_up_s)
        rows.append((f"{name}: open files before / after; memory", text))
        broken += wrong
    return rows, broken


def run(sizes: Sizes, log: TextIO | None = None) -> tuple[list[tuple[str, object]], list[str]]:
    """Soak, and judge; a server that dies is part of the verdict."""
    found = Found()
    try:
        with serve(*OPTIONS) as server:
            asyncio.run(soak(server, sizes, found, log))
    except (RuntimeError, OSError, ExceptionGroup) as error:
        found.broken.append(f"it ended early: {error!r}")
    return judge(found, 60 * sizes.warm_up_minutes)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=Sizes.minutes)
    parser.add_argument("--warm-up-minutes", type=float, default=Sizes.warm_up_minutes)
    parser.add_argument("--concurrency", type=int, default=Sizes.concurrency)
    parser.add_argument("--load", type=float, default=Sizes.load, help="cores that client and server use together")
    parser.add_argument("--seed", type=int, default=Sizes.seed)
    parser.add_argument("--log", type=Path)
    asked = parser.parse_args(argv)
    os.nice(15)
    sizes = Sizes(
        asked.minutes, asked.warm_up_minutes, concurrency=asked.concurrency, load=asked.load, seed=asked.seed
    )  # fmt: skip
    with ExitStack() as stack:
        log = stack.enter_context(asked.log.open("w", encoding="utf-8")) if asked.log else None
        return verdict("soak", *run(sizes, log))


if __name__ == "__main__":
    sys.exit(main())
