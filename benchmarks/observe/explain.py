"""Do explanations explain? How much of its time is left without a cause, of each of many requests of every kind.

    python -m benchmarks.observe.explain [--requests 1000] [--at-once 48] [--blocks 120] [--most-ms 1.0]

A real server with the bundled model and a KV cache that is much too small, so that requests wait and are preempted all the
time. The requests are those of the soak (chats and completions, several texts, grammars, long prompts, stop strings, logprobs;
half of them streamed) and ask for their explanation. Whoever waits must have a reason for all of the time; of the whole time of
a request, what lies in no phase is the unexplained part. The promise: at p99 it is under a millisecond.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from benchmarks.reliability.soak_requests import Kinds
from benchmarks.reliability.watched import percentile, serve, verdict
from minivllm.bench.client import fetch_json, record_events
from minivllm.observe.explain import Explanations
from minivllm.records import ArrivalRecord, FinishedTimes, RowRecord, StepRecord

IN_ANY_PHASE = ("between steps", "the steps held")  # how the sentences begin of waits that lie in other phases than the queue's
Told = dict[str, Any]


def bodies(count: int, seed: int) -> Iterator[tuple[str, Told]]:
    """Paths and bodies of requests that generate."""
    kinds = Kinds(random.Random(seed))
    while count:
        kind, path, body, status = kinds.draw()
        if status == 200 and kind != "tokenize":
            count -= 1
            if "structured_outputs" not in body and "response_format" not in body:
                body["max_tokens"] *= 4  # long enough for rows to outgrow the cache
            yield path, {**body, "explain": True}


async def ask(url: str, path: str, body: Told) -> Told:
    """The explanation of a request that is sent now."""
    if not body.get("stream"):
        return dict((await fetch_json(url + path, body))["explain"])
    events: list[tuple[float, bytes]] = []
    await record_events(url + path, body, {}, events)
    return dict(json.loads(events[-2][1])["explain"])  # the last is the mark


async def ask_all(url: str, found: argparse.Namespace) -> tuple[list[Told], int]:
    """Explanations of all requests, ``at_once`` of which run at any time; and how many got none."""
    waiting, told, failures = bodies(found.requests, found.seed), [], Counter[str]()

    async def client() -> None:
        for path, body in waiting:
            try:
                told.append(await ask(url, path, body))
            except Exception as error:
                failures[f"{type(error).__name__}: {error}"] += 1

    await asyncio.gather(*(client() for _ in range(found.at_once)))
    for sentence, count in failures.items():
        print(f"{count} requests failed: {sentence}")
    return told, failures.total()


def fold_us(num_rows: int = 256, num_waiting: int = 500, num_steps: int = 500) -> float:
    """Microseconds of the server's event loop that one step costs: all rows decode, and one ends and one begins each time."""
    names = deque(f"cmpl-{i:032x}-0" for i in range(num_rows))
    arrivals = [ArrivalRecord(f"cmpl-{i:032x}-0", 0.0, 10, 10) for i in range(num_rows + num_steps + num_waiting)]
    book, encoded = Explanations("stories"), []
    for step in range(num_steps + 1):
        rows = [RowRecord(name, 10, 1, "decode") for name in names]
        if step:
            rows.append(RowRecord(f"cmpl-{num_rows + step:032x}-0", 0, 10, "prefill"))
            names.append(rows[-1].id)
        times = [step * 0.01 + part for part in (0.0, 0.001, 0.008, 0.009)]
        ended = names.popleft()
        life = (ended, "length", 10, 0, 9, 10, 0, 0.0, 0.0, 0.0, times[3])
        record = StepRecord(
            step, *times, tuple(rows), len(rows), num_waiting, (), "rows: max_num_seqs requests are running", 9, 0, 0, 9, 0, 0,
            10, len(rows), (), (), (FinishedTimes(*life),), arrived=() if step else tuple(arrivals),  # type: ignore[arg-type]
        )  # fmt: skip
        encoded.append(msgspec.msgpack.encode(record))
    records = [msgspec.msgpack.decode(one, type=StepRecord) for one in encoded]
    book.observe(records[0])
    began_s = time.process_time()
    for record in records[1:]:
        book.observe(record)
    return 1e6 * (time.process_time() - began_s) / num_steps


def spent(told: Told, *names: str) -> float:
    """Seconds of these phases."""
    return float(sum(phase["ended_s"] - phase["began_s"] for phase in told["phases"] if phase["name"] in names))


def overlapping(told: Told) -> bool:
    """Whether a phase begins before the one in front of it has ended, or lies outside of the request's time."""
    until_s = 0.0
    for phase in told["phases"]:
        if not until_s <= phase["began_s"] <= phase["ended_s"] <= told["total_s"]:
            return True
        until_s = phase["ended_s"]
    return False


def without_reason(told: Told) -> float:
    """Of the seconds that a text waited for a row, those for which no reason is given."""
    given_s = sum(w["seconds"] for w in told["waits"] if not w["text"].startswith(IN_ANY_PHASE))
    return abs(spent(told, "queue", "preempted") - given_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 when the promise is broken."""
    parser = argparse.ArgumentParser(description="How much of requests' time is left without a cause.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--blocks", type=int, default=120)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--most-ms", type=float, default=1.0)
    found = parser.parse_args(argv)
    sizes = {"num-gpu-blocks-override": found.blocks, "max-num-seqs": found.rows, "max-num-batched-tokens": 256}
    with serve(*(word for name, size in sizes.items() for word in (f"--{name}", str(size)))) as server:
        told, failed = asyncio.run(ask_all(server.url, found))
    unexplained_ms = [1e3 * one["unexplained_s"] for one in told]
    texts = [text for one in told for text in (one["sequences"] or [one])]
    reasons = Counter({wait["reason"]: 0.0 for text in texts for wait in text["waits"]})
    for text in texts:
        for wait in text["waits"]:
            reasons[wait["reason"]] += wait["seconds"]
    total_s = sum(one["total_s"] for one in told)
    preempted = sum(len(text["preemptions"]) for text in texts)
    p99_ms = percentile(unexplained_ms, 0.99)
    worst = max(told, key=lambda one: one["unexplained_s"])
    gaps = [(a["ended_s"], b["began_s"] - a["ended_s"], a["name"], b["name"])
            for a, b in zip(worst["phases"], worst["phases"][1:], strict=False)]  # fmt: skip
    at_s, longest_s, before, after = max(gaps, key=lambda gap: gap[1])
    rows: list[tuple[str, object]] = [
        ("requests explained", f"{len(told)} ({len(texts)} texts), {failed} failed"),
        ("preemptions", f"{preempted} in {sum(bool(text['preemptions']) for text in texts)} texts"),
        ("time of a request, s", f"p50 {percentile([o['total_s'] for o in told], 0.5):.2f}, max {worst_total(told):.2f}"),
        *((f"  in {name}", f"{100 * sum(spent(one, name) for one in told) / total_s:.1f} %") for name in phases(told)),
        ("waited for, s", ", ".join(f"{name} {seconds:.1f}" for name, seconds in reasons.most_common())),
        ("unexplained, ms", ", ".join(f"{name} {percentile(unexplained_ms, share):.3f}" for name, share in
                                      (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)))),
        ("the most is behind", f"{before} at {at_s:.3f} s, before {after}: {1e3 * longest_s:.3f} ms"),
        ("a step of 256 rows costs, us", f"{fold_us():.0f} of the server's event loop"),
        ("waits without a reason, ms", f"at most {1e3 * max(map(without_reason, texts)):.3f}"),
    ]  # fmt: skip
    broken = [
        *([f"{failed} requests have no explanation"] if failed or len(told) < found.requests else []),
        *([f"the unexplained part is {p99_ms:.3f} ms at p99"] if p99_ms >= found.most_ms else []),
        *(["phases overlap"] if any(map(overlapping, [*told, *texts])) else []),
        *(["a wait has no reason"] if max(map(without_reason, texts)) > 1e-3 else []),
        *(["nothing was preempted"] if not preempted else []),
    ]
    return verdict("explanations", rows, broken)


def worst_total(told: Sequence[Told]) -> float:
    """The longest time."""
    return float(max(one["total_s"] for one in told))


def phases(told: Sequence[Told]) -> list[str]:
    """Their names, in the order in which they come."""
    return list(dict.fromkeys(phase["name"] for one in told for phase in one["phases"]))


if __name__ == "__main__":
    sys.exit(main())
