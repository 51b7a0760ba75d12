"""The page's fold is the server's, also where records are hard: overlap, aborts, pauses, forks, preemptions, a new life."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from fake_engine import fake_engine
from page_driver import mode, shown

from minivllm.observe.state import State
from minivllm.records import StepRecord
from minivllm.types import GenerateRequest, SamplingParams


def hard_life(life: int, overlap: int, draw: random.Random, steps: int) -> list[StepRecord]:
    """What an engine says to whom everything happens that can happen to requests."""
    engine = fake_engine(97, num_blocks=26, max_num_seqs=6, overlap=overlap)
    open_ids: list[str] = []
    prompts: dict[str, tuple[int, ...]] = {}
    shared, found, now = tuple(draw.choices(range(97), k=40)), [], float(life)
    for i in range(steps):
        now += 0.01
        if draw.random() < 0.25 and len(open_ids) < 12:
            name, parent = f"life{life}-{i}", draw.choice(open_ids) if open_ids and draw.random() < 0.3 else None
            fresh = shared[: draw.randrange(41)] + tuple(draw.choices(range(97), k=draw.randrange(1, 50)))
            prompts[name] = prompts[parent] if parent else fresh
            sampling = SamplingParams(max_tokens=draw.randrange(1, 70), seed=i)
            request = GenerateRequest(id=name, prompt_ids=prompts[name], sampling=sampling, arrival_s=now, fork_of=parent)
            engine.add(request)
            open_ids.append(name)
        if open_ids and draw.random() < 0.1:
            what = draw.choice([engine.abort, engine.pause, engine.resume, engine.resume])
            what([draw.choice(open_ids)])
        output = engine.step() if engine.has_work else None
        if output is None or output.record is None:
            continue
        found.append(output.record)
        open_ids = [name for name in open_ids if name not in {f.id for f in output.record.finished}]
    found[0] = msgspec.structs.replace(found[0], life=life)
    return found


def plain(base: Any) -> Any:
    """A base without what is a matter of order."""
    requests = {
        r["id"]: (r["num_prompt"], r["num_computed"], r["state"], [list(ids) for ids in r["table"]], list(r["tokens"]))
        for r in base["requests"]
    }
    held = {(g, b): sorted(ids) for g, b, ids in base["blocks"]["held"]}
    return requests, held, {(g, b): list(tokens) for g, b, tokens in base["blocks"]["cached"]}, base["blocks"]["total"]


def test_hard_records(visit: Callable[..., Any], server: Any, write_recording: Callable[..., Path]) -> None:
    draw = random.Random(5)
    records = [record for life, overlap in enumerate((0, 1, 1)) for record in hard_life(life, overlap, draw, 900)]
    assert sum(len(r.preempted) for r in records) > 5 and sum(len(r.paused) for r in records) > 5
    assert any(row.cached % 16 for r in records for row in r.rows)  # a fork's begun block
    page = visit(server.url)
    header = {"format": "mini-vllm steps", "version": 1, "model": "hard", "info": {"block_size": 16, "num_blocks": 26}}
    page.set_input_files("#file", write_recording([msgspec.to_builtins(r) for r in records], header))
    mode(page, "replay")
    state, looks = State(16), {3, 50, len(records) // 3, len(records) // 2, len(records) - 1}
    looks |= {i for i, r in enumerate(records) if r.life is not None} | {i for i, r in enumerate(records) if r.preempted}
    places = sorted(looks)
    expected = {}
    for at, record in enumerate(records):
        state.apply(record)
        state.check(record)
        if at in looks:
            expected[at] = plain(msgspec.to_builtins(state.snapshot().base()))
    for at in (*places, *draw.sample(places, 6)):  # on and on, and then back and forth
        page.evaluate(
            "at => { const s = document.querySelector('#seek'); s.value = at; s.dispatchEvent(new Event('input')); }", at + 1
        )
        shown(page, at)
        assert plain(page.evaluate("glass.state")) == expected[at], f"after record {at}"
        counts = "['free', 'cached', 'held', 'shared'].map(kind => Number(document.querySelector('#n-' + kind).textContent))"
        box = page.evaluate(counts)
        r = records[at]
        assert (box[0], box[1], box[2] + box[3]) == (r.blocks_free, r.blocks_cached, r.blocks_referenced)


def test_a_page_that_comes_later(visit: Callable[..., Any], server: Any) -> None:
    """It begins with a base, in which requests may have ended whose blocks are let go with the next record."""
    records = hard_life(0, 1, random.Random(11), 700)
    state, begins, cut = State(16), None, 0
    for i, record in enumerate(records):
        state.apply(record)
        if begins is None and i > 200 and any(r.ended and r.table for r in state.requests.values()):
            begins, cut = msgspec.to_builtins(state.snapshot().base()), i + 1
    assert begins is not None
    info = {"model": "hard", "block_size": 16, "num_blocks": 26}
    told = [{"seq": i, **msgspec.to_builtins(r)} for i, r in enumerate(records)]
    first = {"info": info, "now_s": 0.0, "base": begins, "next": cut}
    asked: list[str] = []

    def answer(route: Any) -> None:
        """The history has nothing, the stream all that follows; then the server is gone."""
        streams = "event-stream" in route.request.headers.get("accept", "")
        asked.append("stream" if streams else "history")
        if asked.count("stream") > 1:
            route.abort()
        elif streams:
            events = ("base", first), ("steps", {"steps": told[cut:]})
            body = "".join(f"event: {name}\ndata: {msgspec.json.encode(value).decode()}\n\n" for name, value in events)
            route.fulfill(body=body, content_type="text/event-stream")
        else:
            route.fulfill(body=msgspec.json.encode({**first, "steps": []}).decode(), content_type="application/json")

    page = visit("about:blank", may_log="net::ERR|Failed to load")
    page.route("**/steps*", answer)
    page.goto(server.url)
    shown(page, len(records) - 1)
    assert plain(page.evaluate("glass.state")) == plain(msgspec.to_builtins(state.snapshot().base()))
    open_lanes = page.evaluate("glass.lanes.filter(lane => lane.end === null).map(lane => lane.id)")
    assert set(open_lanes) == {name for name, r in state.requests.items() if not r.ended}
