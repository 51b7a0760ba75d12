"""Three times as many requests as can be served, for 5 minutes, from clients that do not care (an open loop).

    python -m benchmarks.reliability.overload

First the peak: what is finished a second when as many clients as are taken in ask again and again. Then requests come at random
moments, three times as many a second. The promises: what is finished a second stays at 90 % of the peak or more; who is refused
learns it within 50 ms (99 of 100) with a Retry-After of 1 to 60 s. And a Retry-After can be relied on: of clients that come all
at once, far more than can be taken in, those that are refused and come back when told are taken then (9 of 10).

The model has one core, the server and the clients have the other.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu.machine import CpuClock
from benchmarks.reliability.raw_client import ask
from benchmarks.reliability.watched import Server, percentile, serve, verdict

LEAST_GOODPUT, LEAST_TAKEN, MOST_REFUSAL_S, LONGEST_RETRY_S = 0.9, 0.9, 0.050, 60
BURST = 500
ROWS, QUEUED = 32, 32
PATH = "/v1/completions"
OPTIONS = ("--num-threads", "1", "--max-num-seqs", str(ROWS), "--max-num-queued-reqs", str(QUEUED))


def request(rng: random.Random) -> dict[str, Any]:
    """A stream of some tokens."""
    prompt = f"{rng.random()} Once upon a time"
    return {"prompt": prompt, "max_tokens": rng.randint(32, 96), "ignore_eos": True, "stream": True}


@dataclass
class Storm:
    """What became of the requests. Written by ``one``."""

    finished_s: list[float] = field(default_factory=list)  # when each whole answer ended
    first_s: list[float] = field(default_factory=list)  # from asking to the first byte of those
    refused_s: list[float] = field(default_factory=list)  # from asking to the refusal
    told_s: list[int] = field(default_factory=list)  # what they were told
    others: Counter[str] = field(default_factory=Counter)

    async def one(self, port: int, body: dict[str, Any]) -> float | None:
        """Ask, and note how it went. When to come back, for one that was refused."""
        try:
            reply = await ask(port, PATH, body)
        except OSError as error:
            self.others[type(error).__name__] += 1
            return None
        ended_s = await reply.closed
        if reply.status == 200 and reply.whole:
            self.finished_s.append(ended_s)
            self.first_s.append(reply.times_s[0] - reply.began_s)
        elif reply.status == 503:
            self.refused_s.append(reply.times_s[0] - reply.began_s)
            told = reply.headers.get("retry-after", "")
            if told.isdigit() and 1 <= int(told) <= LONGEST_RETRY_S:
                self.told_s.append(int(told))
                return ended_s + int(told)
            self.others[f"Retry-After {told!r}"] += 1
        else:
            self.others[str(reply.status)] += 1
        return None


async def peak_of(server: Server, seconds: float, rng: random.Random) -> float:
    """Whole answers a second when every row is always taken, and somebody always waits."""
    storm, began_s = Storm(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() < began_s + seconds:
            await storm.one(server.port, request(rng))

    await asyncio.gather(*[client() for _ in range(ROWS + QUEUED)])
    if storm.others or storm.refused_s:
        raise RuntimeError(f"at the peak requests failed: {storm.others}")
    early_s, late_s = began_s + seconds / 5, began_s + seconds
    return sum(early_s < at <= late_s for at in storm.finished_s) / (late_s - early_s)


async def burst(server: Server, count: int, rng: random.Random) -> Storm:
    """So many at once; those that are refused come back when told: what became of these then."""
    first, back = Storm(), Storm()

    async def client() -> None:
        told_s = await first.one(server.port, request(rng))
        if told_s is not None:
            await asyncio.sleep(told_s - time.perf_counter())
            await back.one(server.port, request(rng))

    await asyncio.gather(*[client() for _ in range(count)])
    back.others += first.others
    return back


async def overload(server: Server, per_s: float, seconds: float, rng: random.Random) -> tuple[Storm, float]:
    """Requests at random moments: what became of them, and whole answers a second while they came."""
    storm, tasks, began_s = Storm(), set(), time.perf_counter()
    due_s, end_s = began_s, began_s + seconds
    while (due_s := due_s + rng.expovariate(per_s)) < end_s:
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(storm.one(server.port, request(rng)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(tasks)
    early_s = began_s + min(10.0, seconds / 5)
    return storm, sum(early_s < at <= end_s for at in storm.finished_s) / (end_s - early_s)


async def measure(server: Server, peak_s: float, seconds: float, times: float) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    rng = random.Random(0)
    await peak_of(server, peak_s / 4, rng)  # warms up
    clock = CpuClock.now()
    peak = await peak_of(server, peak_s, rng)
    others = [clock.others_share(clock := CpuClock.now())]
    back = await burst(server, BURST, rng)
    clock = CpuClock.now()
    storm, goodput = await overload(server, times * peak, seconds, rng)
    others.append(clock.others_share(clock := CpuClock.now()))
    again = await peak_of(server, peak_s, rng)
    others.append(clock.others_share(CpuClock.now()))
    best = max(peak, again)
    told = storm.told_s
    refused = percentile(storm.refused_s, 0.99)
    broken = []
    if goodput < LEAST_GOODPUT * best:
        broken.append(f"only {goodput / best:.0%} of the peak are finished")
    if not refused <= MOST_REFUSAL_S:
        broken.append(f"refusals take {1e3 * refused:.0f} ms")
    if storm.others or back.others:
        broken.append(f"other failures: {dict(storm.others + back.others)}")
    if len(back.refused_s) > (1 - LEAST_TAKEN) * (len(back.refused_s) + len(back.finished_s)):
        broken.append(f"{len(back.refused_s)} clients came back when told and were refused again")
    rows: list[tuple[str, object]] = [
        ("peak, answers a second: before, after", f"{peak:.1f}, {again:.1f}"),
        ("cores that other programs took: peak, storm, peak", ", ".join(f"{share:.0%}" for share in others)),
        ("requests a second", f"{times * peak:.1f}, for {seconds:g} s"),
        ("finished, refused", f"{len(storm.finished_s)}, {len(storm.refused_s)}"),
        ("goodput, answers a second", f"{goodput:.1f}, {goodput / best:.1%} of the better peak"),
        ("refused after, ms: p50, p99, max", triple(storm.refused_s)),
        ("first byte of the others after, ms: p50, p99, max", triple(storm.first_s)),
        ("Retry-After, s: p50, p99", f"{percentile(told, 0.5)}, {percentile(told, 0.99)}"),
        (f"of {BURST} at once came back when told: served, refused again", f"{len(back.finished_s)}, {len(back.refused_s)}"),
    ]
    return rows, broken


def triple(values: Sequence[float]) -> str:
    """A distribution of times in ms."""
    return ", ".join(f"{1e3 * percentile(values, share):.1f}" for share in (0.5, 0.99, 1.0))


def run(peak_s: float, seconds: float, times: float) -> tuple[list[tuple[str, object]], list[str]]:
    """Start a server and measure."""
    with serve(*OPTIONS) as server:
        found = asyncio.run(measure(server, peak_s, seconds, times))
        server.wait_idle()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-s", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--times", type=float, default=3.0)
    found = parser.parse_args(argv)
    return verdict("overload", *run(found.peak_s, found.seconds, found.times))


if __name__ == "__main__":
    sys.exit(main())
