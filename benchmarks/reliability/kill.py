"""``kill -9`` of the engine while it talks: do all streams go on, with the same bytes, and how long do they pause?

    python -m benchmarks.reliability.kill [--kills 200] [--streams 64] [--plain] [--hang]

A real server with the bundled model. In each round as many streams as asked for run at once (greedy, seeded, under a grammar,
four texts of a prompt, with logprobs, with prompts in several chunks), the engine is killed at a random moment, and every
stream is read to its end. In batch-invariant mode (the default here) its bytes must be those of a run without a kill. With
``--plain`` (without that mode) its tokens, text, logprobs and usage must agree with each other. ``--hang`` stops the engine's
process instead (SIGSTOP), so that it has to be found out first.

The pause of a stream is the longest time between two of its events.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.reliability.watched import Server, percentile, serve, verdict
from minivllm.bench.client import RequestFailed, record_events

MOST_PAUSE_S: Final = 1.5
MOST_SILENCE_S: Final = 12.0  # before a hanging engine is found out
ROUND_S: Final = 60.0
STORY: Final = "Once upon a time there was a small fox who lived near the river with his mother. "


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests of every kind, each with a seed of its own."""
    ages = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 30}
    properties = {"name": {"type": "string", "maxLength": 60}, "ages": ages}
    schema = {"type": "object", "properties": properties, "required": ["name", "ages"]}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"structured_outputs": {"json": schema}, "ignore_eos": False},
        {"n": 4},
        {"logprobs": 3},
        {"prompt": STORY * 35},
        {"repetition_penalty": 1.1, "top_p": 0.9, "logprobs": 0},
        {"prompt": STORY * 20, "n": 2, "temperature": 0.7},
    ]
    common = {"max_tokens": 96, "ignore_eos": True, "stream": True, "return_token_ids": True,
              "stream_options": {"include_usage": True}}  # fmt: skip
    return [{"prompt": f"{i}. " + STORY, **common, "seed": 1000 + i, **kinds[i % len(kinds)]} for i in range(count)]


class Reading:
    """One stream, read to its end."""

    def __init__(self) -> None:
        self.events: list[tuple[float, bytes]] = []
        self.problem = ""

    @property
    def said(self) -> dict[int, dict[str, Any]]:
        """Of each text: all that was told."""
        found: dict[int, dict[str, Any]] = {}
        for _, event in self.events:
            if event == b"[DONE]":
                continue
            for choice in json.loads(event)["choices"]:
                text = found.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": [], "end": None})
                text["text"] += choice["text"]
                text["ids"] += choice.get("token_ids") or []
                text["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
                text["end"] = choice["finish_reason"] or text["end"]
        return found

    @property
    def pause_s(self) -> float:
        """The longest time between two events."""
        times = [at for at, _ in self.events]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


async def read(server: Server, body: dict[str, Any]) -> Reading:
    """Ask, and read to the end."""
    reading = Reading()
    try:
        async with asyncio.timeout(ROUND_S):
            await record_events(server.url + "/v1/completions", body, {}, reading.events)
    except (RequestFailed, TimeoutError, OSError) as error:
        reading.problem = f"{type(error).__name__}: {error}"
    if not reading.problem and (not reading.events or reading.events[-1][1] != b"[DONE]"):
        reading.problem = "it did not end with [DONE]"
    return reading


def engine_of(server: Server) -> int | None:
    """The engine's process; None while there is none."""
    for child in _children(server.process.pid):
        if "zygote" in Path(f"/proc/{child}/cmdline").read_text():
            return next(iter(_children(child)), None)
    return None


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


async def rounds(
    server: Server, found: argparse.Namespace, asked: Sequence[dict[str, Any]], expected: Sequence[Reading]
) -> tuple[list[str], list[float], int]:
    """What went wrong, the pauses of all streams that were there at a kill, and how many streams were killed under."""
    draw, broken, pauses, hit = random.Random(found.seed), [], [], 0
    for number in range(found.kills):
        tasks = [asyncio.create_task(read(server, body)) for body in asked]
        await asyncio.sleep(draw.uniform(0.05, found.latest_s))
        if (pid := engine_of(server)) is not None:
            os.kill(pid, signal.SIGSTOP if found.hang else signal.SIGKILL)
        killed_s = time.perf_counter()
        readings = await asyncio.gather(*tasks)
        for i, (reading, whole) in enumerate(zip(readings, expected, strict=True)):
            if reading.problem:
                broken.append(f"round {number}, stream {i}: {reading.problem}")
                continue
            if reading.events[-1][0] > killed_s:
                hit += 1
                pauses.append(reading.pause_s)
            if wrong := _differs(reading, whole, plain=found.plain):
                broken.append(f"round {number}, stream {i}: {wrong}")
        if broken and len(broken) > 20:
            break
    return broken, pauses, hit


def _differs(reading: Reading, whole: Reading, *, plain: bool) -> str:
    """What is wrong with a stream; empty: nothing."""
    said, expected = reading.said, whole.said
    if not plain:
        return "" if said == expected else "other bytes than without a kill"
    usage = json.loads(reading.events[-2][1])["usage"]
    if usage["completion_tokens"] != sum(len(text["ids"]) for text in said.values()):
        return "its usage does not count the tokens it was told"
    for index, text in expected.items():
        if said[index]["end"] != text["end"] or (text["end"] == "length" and len(said[index]["ids"]) != len(text["ids"])):
            return "another end than without a kill"
        if text["logprobs"] and len(said[index]["logprobs"]) != len(said[index]["ids"]):
            return "logprobs are lost or double"
    return ""


async def bench(server: Server, found: argparse.Namespace) -> int:
    """Run it; the exit code."""
    asked = bodies(found.streams)
    expected = await asyncio.gather(*[read(server, body) for body in asked])
    if problems := [reading.problem for reading in expected if reading.problem]:
        raise RuntimeError(f"a run without a kill fails already: {problems[0]}")
    quiet_s = percentile([reading.pause_s for reading in expected], 0.99)
    began_s = time.monotonic()
    broken, pauses, hit = await rounds(server, found, asked, expected)
    restarts = server.metrics()["engine_restarts"]
    most_s = MOST_SILENCE_S + MOST_PAUSE_S if found.hang else MOST_PAUSE_S
    if percentile(pauses, 0.99) > most_s:
        broken.append(f"the pause's p99 is above {most_s} s")
    if restarts < found.kills:
        broken.append(f"only {restarts} engines were replaced")
    server.wait_idle()
    rows = [
        ("mode", "plain" if found.plain else "batch-invariant"),
        ("engines " + ("stopped" if found.hang else "killed"), found.kills),
        ("engines that took their place", restarts),
        ("streams read to their end", found.kills * found.streams),
        ("of these, running at a kill", hit),
        ("longest pause p50 / p99 / max, s", " / ".join(f"{percentile(pauses, share):.2f}" for share in (0.5, 0.99, 1.0))),
        ("the same without a kill, p99, s", f"{quiet_s:.2f}"),
        ("wrong or incomplete streams", len(broken)),
        ("took, s", f"{time.monotonic() - began_s:.0f}"),
    ]
    return verdict("kill", rows, broken)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--latest-s", type=float, default=2.0, help="latest moment of a round at which the engine is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without batch-invariant mode")
    parser.add_argument("--hang", action="store_true", help="stop the engine's process instead of killing it")
    found = parser.parse_args()
    options = [] if found.plain else ["--batch-invariant"]
    with serve("--max-engine-restarts", str(10 * found.kills), "--max-num-batched-tokens", "512", *options) as server:
        return asyncio.run(bench(server, found))


if __name__ == "__main__":
    sys.exit(main())
