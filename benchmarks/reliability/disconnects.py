"""Clients that leave at random moments: queued, in the middle of their prompt, decoding, n > 1, streaming or not, beams.

    python -m benchmarks.reliability.disconnects

The promise: the blocks of an aborted sequence are free within 2 steps of the engine, wherever the sequence was, and in the end
nothing is held.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.reliability.raw_client import ask
from benchmarks.reliability.watched import Server, percentile, serve, verdict

MOST_STEPS = 2
OPTIONS = ("--num-threads", "1", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "1200")
LONG = "Once upon a time there was a little fox who had a red ball and played with it in the garden. " * 24


def body_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of one of the kinds that matter."""
    prompt = f"{rng.random()} " + (LONG if rng.random() < 0.4 else "Once upon a time")
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True, "stream": rng.random() < 0.5}
    kind = rng.random()
    if kind < 0.2:
        body |= {"n": rng.randint(2, 4), "temperature": 1.0}
    elif kind < 0.3:
        body |= {"use_beam_search": True, "n": 3, "max_tokens": 40, "stream": False}
        del body["ignore_eos"]
    elif kind < 0.5:
        del body["ignore_eos"]
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": body.pop("prompt")}], **body}
    return "/v1/completions", body


async def leave(server: Server, rng: random.Random, kinds: Counter[str]) -> None:
    """One client: it asks, waits a random while, and goes, by a reset as often as by a close."""
    path, body = body_of(rng)
    reply = await ask(server.port, path, body, keeps=False)
    await asyncio.wait({reply.closed}, timeout=rng.expovariate(1 / 0.4))
    kinds["had ended already" if reply.closed.done() else "left"] += 1
    (reply.transport.abort if rng.random() < 0.5 else reply.transport.close)()


async def measure(server: Server, count: int, concurrency: int, seed: int) -> Counter[str]:
    """Let ``count`` clients leave while they run, ``concurrency`` at a time."""
    rng, kinds = random.Random(seed), Counter[str]()

    async def worker() -> None:
        while kinds["left"] < count:
            await leave(server, rng, kinds)

    await asyncio.gather(*[worker() for _ in range(concurrency)])
    return kinds


def run(count: int, concurrency: int, seed: int) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    with serve(*OPTIONS) as server:
        kinds = asyncio.run(measure(server, count, concurrency, seed))
        broken = []
        try:
            server.wait_idle()
        except RuntimeError as error:
            broken.append(f"something is held in the end: {error}")
        found = [json.loads(line) for line in server.log.read_text().splitlines()]
    places = Counter(line["place"] for line in found)
    steps = Counter(line["steps"] for line in found)
    if max(steps, default=0) > MOST_STEPS:
        broken.append(f"blocks came back only after {max(steps)} steps")
    if missing := [place for place in ("queued", "prefill", "decode") if not places[place]]:
        broken.append(f"nobody left while {missing[0]}: this run says little")
    rows: list[tuple[str, object]] = [
        ("clients that left", kinds["left"]),
        ("sequences aborted", len(found)),
        ("of them queued, in their prompt, decoding", f"{places['queued']}, {places['prefill']}, {places['decode']}"),
        ("steps until the blocks were back", dict(sorted(steps.items()))),
        ("ms until then, p50 and p99", ", ".join(f"{percentile([f['ms'] for f in found], p):.1f}" for p in (0.5, 0.99))),
    ]
    return rows, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disconnects", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(argv)
    return verdict("disconnects", *run(found.disconnects, found.concurrency, found.seed))


if __name__ == "__main__":
    sys.exit(main())
