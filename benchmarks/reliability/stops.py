"""Servers that are asked to stop, or killed, in the middle of 64 streams.

    python -m benchmarks.reliability.stops

The promises: SIGTERM lets every stream finish within the time and the server ends with 0. After SIGKILL of the server nothing
is left after 2 s: no process that it started, no file in shared memory, no socket in the file system.
"""

import argparse
import asyncio
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.machine import process_tree
from benchmarks.reliability.raw_client import Reply, ask
from benchmarks.reliability.watched import Server, serve, verdict

MOST_LEFT_S = 2.0
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def leftovers() -> set[str]:
    """Files that processes share: in shared memory, and sockets that have a path."""
    sockets = re.findall(r"(/\S+)$", Path("/proc/net/unix").read_text(encoding="utf-8"), re.MULTILINE)
    return {str(path) for path in Path("/dev/shm").rglob("*")} | set(sockets)


def alive(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def streams(server: Server, count: int, tokens: int) -> list[Reply]:
    """Begin so many streams, one of them with a grammar, and wait until each has begun."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    grammar = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "stream": False}
    await (await ask(server.port, "/v1/completions", {**body, **grammar, "max_tokens": 30, "ignore_eos": False})).closed
    replies = [await ask(server.port, "/v1/completions", body) for _ in range(count)]
    while not all(reply.times_s for reply in replies):
        await asyncio.sleep(0.01)
    return replies


def killed(count: int) -> tuple[int, float, set[str]]:
    """Kill a server: processes that it had, how long the last of them lived on, and what else is left."""
    before = leftovers()
    with serve("--num-threads", "1", ends_with=-signal.SIGKILL) as server:
        asyncio.run(streams(server, count, 900))
        children = process_tree(server.process.pid)[1:]
        server.process.kill()
        began_s = time.perf_counter()
        while any(map(alive, children)) and time.perf_counter() < began_s + 30:
            time.sleep(0.005)
        return len(children), time.perf_counter() - began_s, leftovers() - before


async def _stopped(server: Server, count: int) -> int:
    replies = await streams(server, count, 40)
    server.process.terminate()
    await asyncio.gather(*[reply.closed for reply in replies])
    return sum(reply.whole for reply in replies)


def stopped(count: int) -> int:
    """Ask a server to stop: streams that came to their good end. Raises ``RuntimeError`` when it does not end with 0."""
    with serve("--num-threads", "1") as server:
        whole = asyncio.run(_stopped(server, count))
        server.process.wait(60)
        return whole


def run(times: int, count: int) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    broken: list[str] = []
    kills = [killed(count) for _ in range(times)]
    whole = [stopped(count) for _ in range(times)]
    longest_s = max(left_s for _, left_s, _ in kills)
    if longest_s > MOST_LEFT_S:
        broken.append(f"a process lived on for {longest_s:.1f} s")
    if files := set().union(*[found for _, _, found in kills]):
        broken.append(f"left behind: {sorted(files)[:5]}")
    if sum(whole) < times * count:
        broken.append(f"{times * count - sum(whole)} streams did not finish in a drain")
    rows: list[tuple[str, object]] = [
        ("servers killed, each with its processes", f"{times}, {sorted({number for number, _, _ in kills})}"),
        ("the last process was gone after, s: longest", f"{longest_s:.3f}"),
        ("files and sockets left", len(files)),
        ("servers asked to stop, all with exit code 0", times),
        ("streams that finished meanwhile", f"{sum(whole)} of {times * count}"),
    ]
    return rows, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--streams", type=int, default=64)
    found = parser.parse_args(argv)
    return verdict("stops", *run(found.times, found.streams))


if __name__ == "__main__":
    sys.exit(main())
