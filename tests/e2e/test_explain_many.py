"""Many requests of every kind, whose rows outgrow the cache: each second of each has its place and its reason."""

import asyncio
import itertools
import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import serve

STORY = "Once upon a time there was a small fox who lived near the river with his mother. "
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
COUNT = 60


def bodies() -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(4)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0}, {"n": 3}, {"logprobs": 2}, {"prompt": STORY * 12}, {"stop": [" the"]},
        {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False}, {"prompt": [STORY, "The"], "n": 2},
    ]  # fmt: skip
    found = []
    for i in range(COUNT):
        common = {"max_tokens": rng.randint(20, 120), "seed": i, "stream": i % 2 == 0, "explain": True, "ignore_eos": True}
        body = {"prompt": f"{i}. " + STORY, **common, **kinds[i % len(kinds)]}
        if i % 5 == 0 and isinstance(body["prompt"], str):
            body["logprobs"] = "logprobs" in body
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        found.append(("/v1/chat/completions" if "messages" in body else "/v1/completions", body))
    return found


async def explanations(url: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=24)) as http:

        async def one(path: str, body: dict[str, Any]) -> dict[str, Any]:
            reply = await http.post(path, json=body)
            assert reply.status_code == 200, reply.text
            text = reply.text.rstrip().split("\n\n")[-2].removeprefix("data: ") if body["stream"] else reply.text
            return dict(json.loads(text)["explain"])

        return list(await asyncio.gather(*(one(path, body) for path, body in bodies())))


def union_s(spans: list[tuple[float, float]]) -> float:
    """The time that spans cover, however they lie: by a count of those that are open."""
    edges = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    covered, depth = 0.0, 0
    for (at, step), (after, _) in itertools.pairwise(edges):
        depth += step
        covered += (after - at) if depth else 0.0
    return covered


def check(told: dict[str, Any]) -> None:
    spans = [(p["began_s"], p["ended_s"]) for p in told["phases"]]
    assert all(0 <= begin <= end <= told["total_s"] for begin, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "phases overlap"
    assert told["unexplained_s"] == pytest.approx(told["total_s"] - union_s(spans), abs=1e-5)
    assert 0 <= told["unexplained_s"] < told["total_s"]
    in_queue = sum(p["ended_s"] - p["began_s"] for p in told["phases"] if p["name"] in ("queue", "preempted"))
    reasons = [w for w in told["waits"] if not w["text"].startswith(("between steps", "the steps held"))]
    assert in_queue == pytest.approx(sum(w["seconds"] for w in reasons), abs=1e-4)


@pytest.mark.slow
def test_each_second_of_many_requests_has_its_place_and_its_reason() -> None:
    sizes = ("--num-gpu-blocks-override", "70", "--max-num-seqs", "16", "--max-num-batched-tokens", "128")
    with serve(*sizes) as live:
        told = asyncio.run(explanations(live.url))
        live.wait_idle()
        assert live.metrics()["total_preemptions"] > 0
    assert len({one["id"] for one in told}) == COUNT
    texts = [text for one in told for text in (one["sequences"] or [one])]
    for each in (*told, *texts):
        if not each["sequences"]:
            check(each)
    for one in told:
        assert one["total_s"] >= max(text["total_s"] for text in (one["sequences"] or [one]))
        assert one["finish_reason"] in ("length", "stop")
    assert sum(len(text["preemptions"]) for text in texts) > 0
    assert {w["reason"] for text in texts for w in text["waits"]} >= {"blocks", "rows", "engine"}


def test_the_benchmark_draws_requests_and_measures_the_fold(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo))
    benchmark = import_module("benchmarks.observe.explain")
    drawn = list(benchmark.bodies(40, 1))
    assert len(drawn) == 40 and all(body["explain"] is True for _, body in drawn)
    assert {path for path, _ in drawn} == {"/v1/completions", "/v1/chat/completions"}
    assert benchmark.fold_us(4, 3, 5) > 0
