"""Clients that never read, beside others that do.

    python -m benchmarks.reliability.slow_readers

200 streams whose clients do not read fill what the kernel and the server hold for them, and stall. Each is then paused in the
engine: its KV blocks are free. They stay so for 5 minutes; then their clients read after all, and each gets its whole text, the
one that a client which reads at once got. The promises: a stalled stream costs the server at most 128 KiB, its socket's buffer
included, and the time between the others' tokens is within 10 % of what it is without them.
"""

import argparse
import asyncio
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cpu.machine import CpuClock
from benchmarks.cpu.machine import _tree_cpu_s as tree_cpu_s
from benchmarks.reliability.raw_client import Reply, ask, ask_and_not_read, texts_of
from benchmarks.reliability.watched import Server, percentile, serve, verdict
from minivllm.server.listen import SEND_BUFFER_BYTES

MOST_BYTES, MOST_ITL = 128 * 2**10, 1.10
PATH = "/v1/completions"
STORIES = 20  # different ones


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    stalled: int
    readers: int
    hold_s: float
    rounds: int  # of reading without the stalled ones, before and after
    tokens: int = 400  # that a reader reads


def options(sizes: Sizes) -> list[str]:
    """Of the server: room for everybody, texts that depend on nothing but their request."""
    return [
        "--num-threads", "1", "--slow-reader-pause", "2", "--write-timeout-s", "3600",
        "--max-num-seqs", str(sizes.stalled + sizes.readers), "--max-num-batched-tokens", "2048", "--batch-invariant",
    ]  # fmt: skip


def long_request(number: int) -> dict[str, Any]:
    """A stream that is far longer than all buffers: some hundred bytes a token."""
    return {
        "prompt": f"Story number {number % STORIES}. Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


async def _read(server: Server, sizes: Sizes) -> list[float]:
    body = {"prompt": "Once upon a time", "max_tokens": sizes.tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    replies = [await ask(server.port, PATH, body) for _ in range(sizes.readers)]
    await asyncio.gather(*[reply.closed for reply in replies])
    if not all(reply.whole for reply in replies):
        raise RuntimeError("a reader did not get its text")
    # Pieces may hold several tokens, so a stream's time is divided by its tokens.
    return [(reply.times_s[-1] - reply.times_s[1]) / sizes.tokens for reply in replies]


class Rounds:
    """Clients that read, round after round. Written by ``measure``."""

    def __init__(self) -> None:
        self.itl_s: list[float] = []  # the mean time between two tokens, of each round
        self.cpu_s: list[float] = []  # that server and engine took for a token
        self.others: list[float] = []  # the share of the cores that other programs took in each

    def read(self, server: Server, sizes: Sizes) -> None:
        """A round."""
        clock, cpu_s = CpuClock.now(), tree_cpu_s(server.process.pid)
        found = asyncio.run(_read(server, sizes))
        self.itl_s.append(sum(found) / len(found))
        self.cpu_s.append((tree_cpu_s(server.process.pid) - cpu_s) / (sizes.tokens * sizes.readers))
        self.others.append(clock.others_share(CpuClock.now()))

    @property
    def told(self) -> str:
        """Rounds as a row of the table."""
        low, middle = 1e3 * min(self.itl_s), 1e3 * percentile(self.itl_s, 0.5)
        share = percentile(self.others, 0.5)
        cpu = 1e3 * percentile(self.cpu_s, 0.5)
        return f"{low:.2f}, {middle:.2f}, {cpu:.3f} ({len(self.itl_s)} rounds; other programs took {share:.0%} of the cores)"


async def whole_texts(server: Server, numbers: Sequence[int]) -> dict[int, str]:
    """What clients that read at once get."""
    replies: dict[int, Reply] = {n: await ask(server.port, PATH, long_request(n)) for n in numbers}
    await asyncio.gather(*[reply.closed for reply in replies.values()])
    return {n: texts_of(reply.data) for n, reply in replies.items()}


def read_after_all(socks: Sequence[socket.socket]) -> list[bytes]:
    """What lay there, and what comes now, until each stream has ended."""
    parts: list[list[bytes]] = [[] for _ in socks]
    with selectors.DefaultSelector() as selector:
        for i, sock in enumerate(socks):
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, i)
        while selector.get_map():
            if not (ready := selector.select(timeout=60)):
                raise RuntimeError(f"{len(selector.get_map())} streams did not go on")
            for key, _ in ready:
                part = key.fileobj.recv(65536)  # type: ignore[union-attr]
                parts[key.data].append(part)
                if not part:
                    selector.unregister(key.fileobj)
    return [unchunked(b"".join(found)) for found in parts]


def unchunked(reply: bytes) -> bytes:
    """The body of a chunked reply."""
    body, out = reply.split(b"\r\n\r\n", 1)[1], []
    while match := re.match(rb"([0-9a-f]+)\r\n", body):
        size = int(match[1], 16)
        out.append(body[match.end() : match.end() + size])
        body = body[match.end() + size + 2 :]
    return b"".join(out)


def stall(server: Server, sizes: Sizes) -> tuple[list[socket.socket], dict[str, float]]:
    """Streams that nobody reads, and the server's metrics once each of them is paused."""
    socks = [ask_and_not_read(server.port, PATH, long_request(i)) for i in range(sizes.stalled)]
    return socks, server.wait_for(300, paused_requests=sizes.stalled, active_requests=0, waiting_requests=0)


def bytes_each(sizes: Sizes) -> float:
    """Memory of the server for a stalled stream; of one that keeps no records of steps, which are a ring for all of them."""
    with serve(*options(sizes), "--step-records", "0") as server:
        asyncio.run(whole_texts(server, range(min(STORIES, sizes.stalled))))
        rounds = Rounds()
        for _ in range(3):
            rounds.read(server, sizes)
        server.wait_idle()
        before = server.memory_bytes()
        socks, _ = stall(server, sizes)
        rounds.read(server, sizes)
        each = (server.memory_bytes() - before) / sizes.stalled
        for sock in socks:
            sock.close()
    return each


def measure(sizes: Sizes) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    broken: list[str] = []
    each = bytes_each(sizes)
    with serve(*options(sizes)) as server:
        texts = asyncio.run(whole_texts(server, range(min(STORIES, sizes.stalled))))
        alone, beside = Rounds(), Rounds()
        for _ in range(sizes.rounds):
            alone.read(server, sizes)
        server.wait_idle()
        before = server.memory_bytes()
        began = time.monotonic()
        socks, stalled = stall(server, sizes)
        stalled_s = time.monotonic() - began
        if stalled["kv_cache_usage"]:
            broken.append(f"paused streams hold {stalled['kv_cache_usage']:.0%} of the KV cache")
        beside.read(server, sizes)
        memory = server.memory_bytes()
        while time.monotonic() < began + sizes.hold_s:
            beside.read(server, sizes)
            memory = max(memory, server.memory_bytes())
        if server.metrics()["paused_requests"] != sizes.stalled:
            broken.append("a paused stream went on before it was read")
        bodies = read_after_all(socks)
        server.wait_idle()
        for _ in range(sizes.rounds):
            alone.read(server, sizes)
        same = [texts_of(body) == texts[i % STORIES] and body.endswith(b"data: [DONE]\n\n") for i, body in enumerate(bodies)]
        for sock in socks:
            sock.close()
    ratio = min(beside.itl_s) / min(alone.itl_s)  # of the rounds that other programs disturbed least
    if each + 2 * SEND_BUFFER_BYTES > MOST_BYTES:
        broken.append(f"a stalled stream costs {(each + 2 * SEND_BUFFER_BYTES) / 1024:.0f} KiB")
    if not all(same):
        broken.append(f"{same.count(False)} of {len(same)} streams did not get the text that a reader gets")
    rows: list[tuple[str, object]] = [
        ("streams that stalled and were paused", f"{sizes.stalled}, {stalled_s:.0f} s after they began"),
        ("KV blocks they held then", f"{stalled['kv_cache_usage']:.1%}"),
        ("server memory each, KiB", f"{each / 1024:.1f}, and at most {2 * SEND_BUFFER_BYTES // 1024} in the kernel"),
        ("MiB of all, records of steps and all else meanwhile", f"{(memory - before) / 2**20:.1f}"),
        ("whole texts when they were read", f"{same.count(True)} of {len(same)}"),
        ("others' ITL alone, ms: best round, median; CPU time a token, ms", alone.told),
        ("others' ITL beside them", beside.told),
        ("ratio of the best rounds", f"{ratio:.3f}"),
    ]
    if ratio > MOST_ITL:
        broken.append(f"others' tokens come {ratio:.2f} times as slowly")
    return rows, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stalled", type=int, default=200)
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--hold-s", type=float, default=300.0)
    parser.add_argument("--rounds", type=int, default=10)
    found = parser.parse_args(argv)
    rows, broken = measure(Sizes(found.stalled, found.readers, found.hold_s, found.rounds))
    return verdict("slow readers", rows, broken)


if __name__ == "__main__":
    sys.exit(main())
