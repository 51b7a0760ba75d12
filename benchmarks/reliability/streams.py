"""Many streams open at once, each with a token a second.

    python -m benchmarks.reliability.streams

The engine is a source of tokens without a model, behind the same seam, so that what is measured is the server. The promises: a
stream costs at most 64 KiB of the server's memory (RssAnon and swap), and of 100 gaps between pieces of a stream 99 are no
longer than 1.5 s.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence

from benchmarks.cpu.machine import CpuClock
from benchmarks.reliability.raw_client import Reply, ask
from benchmarks.reliability.watched import Server, percentile, serve, verdict
from minivllm.cli.serve import raise_open_files_limit

MOST_BYTES, MOST_GAP_S = 64 * 2**10, 1.5
PATH = "/v1/chat/completions"


def request(max_tokens: int) -> dict[str, object]:
    """A chat that is streamed."""
    return {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": max_tokens, "stream": True}


async def open_streams(server: Server, count: int, max_tokens: int, per_s: float) -> list[Reply]:
    """Open so many, one after the other."""
    began_s, replies = time.perf_counter(), []
    for i in range(count):
        if (wait_s := began_s + i / per_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        replies.append(await ask(server.port, PATH, request(max_tokens), keeps=False))
    return replies


async def measure(server: Server, count: int, hold_s: float, per_s: float) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    warm = await open_streams(server, min(50, count), 3, per_s)
    await asyncio.gather(*[reply.closed for reply in warm])
    before = server.memory_bytes()
    ramp_s = count / per_s
    replies = await open_streams(server, count, int(ramp_s + hold_s) + 10, per_s)
    began_s, memory, clock = time.perf_counter(), 0, CpuClock.now()
    while time.perf_counter() < began_s + hold_s:
        await asyncio.sleep(1.0)
        memory = max(memory, server.memory_bytes())
    open_now = sum(not reply.closed.done() for reply in replies)
    ended_s, later = time.perf_counter(), CpuClock.now()
    gaps = [
        b - a
        for reply in replies
        for a, b in zip(reply.times_s, reply.times_s[1:], strict=False)
        if began_s <= b <= ended_s
    ]
    await asyncio.gather(*[reply.closed for reply in replies])
    whole = sum(reply.whole for reply in replies)
    each, gap_s = (memory - before) / count, percentile(gaps, 0.99)
    broken = []
    if open_now < count or whole < count:
        tail = next((reply.data for reply in replies if not reply.whole), b"")
        broken.append(f"of {count} streams {open_now} were open at once, {whole} came to their good end; one ends {tail!r}")
    if each > MOST_BYTES:
        broken.append(f"a stream costs {each / 1024:.1f} KiB")
    if not gap_s <= MOST_GAP_S:
        broken.append(f"99 of 100 gaps are up to {gap_s:.2f} s")
    rows: list[tuple[str, object]] = [
        ("streams open at once, whole in the end", f"{open_now}, {whole}"),
        ("server memory before, then, MiB", f"{before / 2**20:.1f}, {memory / 2**20:.1f}"),
        ("each stream, KiB", f"{each / 1024:.1f}"),
        ("cores that this took, that other programs took", f"{cores(clock, later):.2f}, {others(clock, later):.2f}"),
        ("gaps, s: p50, p99, max", ", ".join(f"{percentile(gaps, share):.3f}" for share in (0.5, 0.99, 1.0))),
    ]
    return rows, broken


def cores(clock: CpuClock, later: CpuClock) -> float:
    """Used by the server, the source of tokens and the clients."""
    return (later.own_s - clock.own_s) / (later.at_s - clock.at_s)


def others(clock: CpuClock, later: CpuClock) -> float:
    """Used by everybody else."""
    return clock.others_share(later) * (os.cpu_count() or 1)


def run(count: int, hold_s: float, token_s: float, per_s: float) -> tuple[list[tuple[str, object]], list[str]]:
    """Start a server and measure."""
    with serve("--token-s", str(token_s), "--max-num-seqs", str(count), "--max-num-batched-tokens", str(count)) as server:
        return asyncio.run(measure(server, count, hold_s, per_s))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--hold-s", type=float, default=60.0)
    parser.add_argument("--token-s", type=float, default=1.0)
    parser.add_argument("--per-s", type=float, default=100.0, help="streams opened a second")
    found = parser.parse_args(argv)
    raise_open_files_limit()
    return verdict("streams", *run(found.streams, found.hold_s, found.token_s, found.per_s))


if __name__ == "__main__":
    sys.exit(main())
