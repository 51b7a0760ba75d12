"""Workers that follow grammars are lost, refuse and end: what becomes of the texts, and of the workers."""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm.engine.grammars import Grammars, GrammarSizes
from minivllm.engine.guide_pool import GuidePool
from minivllm.errors import InvalidRequest
from minivllm.llm import LLM
from minivllm.text.grammar import choice_grammar
from minivllm.text.helper import Words
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import GUIDE_FAULT, Grammar, SamplingParams

LONG = Grammar("regex", "[a-z]{300}")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(pool: GuidePool, count: int) -> list[int]:
    """The workers' processes, when as many are there as there should be."""
    for _ in range(500):
        if len(found := children_of(pool._nursery.pid)) == count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{found} are not {count} workers")


def runs(pid: int) -> bool:
    """Not a zombie either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_gone(pids: list[int]) -> None:
    for _ in range(1000):
        if not any(map(runs, pids)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pids} still run")


@pytest.fixture
def llm(bundled_model: Path) -> LLM:
    options = {"device": "cpu", "num_threads": 1, "max_num_seqs": 6, "num_gpu_blocks_override": 200}
    return LLM(str(bundled_model), num_grammar_workers=2, **options)


@pytest.fixture
def begin(llm: LLM) -> Callable[..., Iterator[dict[str, list[Any]]]]:
    """Start some requests; each ``next`` is a step, and gives all events so far."""

    def start(*grammars: Grammar | None, max_tokens: int = 40) -> Iterator[dict[str, list[Any]]]:
        events: dict[str, list[Any]] = defaultdict(list)
        for number, grammar in enumerate(grammars):
            asked = SamplingParams(max_tokens=max_tokens, seed=number, grammar=grammar, ignore_eos=True)
            llm.engine.add(llm._request("The", asked))
        while llm.engine.has_work:
            output = llm.engine.step()
            for event in () if output is None else output.events:
                events[event.id].append(event)
            yield events

    return start


def pool_of(llm: LLM) -> GuidePool:
    assert llm.engine._grammars is not None and llm.engine._grammars._pool is not None
    return llm.engine._grammars._pool


def test_a_lost_worker_costs_its_texts_only(llm: LLM, begin: Callable[..., Iterator[dict[str, list[Any]]]]) -> None:
    steps = begin(LONG, LONG, None, LONG, LONG)
    while sum(map(bool, next(steps).values())) < 5:
        pass
    pool = pool_of(llm)
    of_worker = [len(worker.texts) for worker in pool.workers]
    assert of_worker == [2, 2]
    victim = workers_of(pool, 2)[0]
    os.kill(victim, signal.SIGKILL)
    until_gone([victim])
    *_, events = steps
    last = [found[-1] for found in events.values()]
    assert sorted(event.finish_reason for event in last) == ["error", "error", "length", "length", "length"]
    assert {event.error for event in last} == {None, GUIDE_FAULT}
    counts = [sum(len(event.token_ids) for event in found) for found in events.values()]
    assert sorted(counts)[2:] == [40] * 3
    llm.engine.check()
    assert victim not in workers_of(pool, 2), "another took its place"
    *_, events = begin(LONG, LONG, LONG, LONG)
    assert [found[-1].finish_reason for found in events.values()] == ["length"] * 4
    assert [len(worker.texts) for worker in pool.workers] == [0, 0], "texts that ended are let go"


def test_a_worker_that_was_lost_while_it_had_nothing_to_do(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=9, grammar=choice_grammar(["yes"]))
    assert llm.generate(["The"], asked)[0].text == "yes"
    pool = pool_of(llm)
    lost = workers_of(pool, 2)
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    until_gone(lost)
    found = []
    for _ in range(4):
        llm.engine.add(request := llm._request("The", asked))
        while llm.engine.has_work:
            output = llm.engine.step()
            found += [e for e in (() if output is None else output.events) if e.finish_reason and e.id == request.id]
    assert [event.finish_reason for event in found][-2:] == ["stop", "stop"], "each is missed once at most"
    assert not set(lost) & set(workers_of(pool, 2))


def test_without_a_nursery_the_engine_follows(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=9, grammar=choice_grammar(["yes"]))
    assert llm.generate(["The"], asked)[0].text == "yes"
    pool = pool_of(llm)
    workers = workers_of(pool, 2)
    pool._nursery.kill()
    until_gone(workers)
    found = []
    for _ in range(4):
        llm.engine.add(llm._request("The", asked))
        while llm.engine.has_work:
            output = llm.engine.step()
            found += [event for event in (() if output is None else output.events) if event.finish_reason]
    assert [event.finish_reason for event in found][-2:] == ["stop", "stop"] and len(found) == 4


def test_no_worker_outlives_its_engine(bundled_model: Path) -> None:
    tokenizer = load_tokenizer(bundled_model)
    words = Words(tokenizer.as_json(), tokenizer.vocab_size, tokenizer.known_ids([0]))
    grammars = Grammars(lambda: words, GrammarSizes(tokenizer.vocab_size, 2, 1, 2))
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        grammars.prepare(Grammar("lark", "start: nothing"), hurries=True).result(60)
    assert grammars._pool is not None
    pids = [grammars._pool._nursery.pid, *workers_of(grammars._pool, 2)]
    del grammars
    until_gone(pids)
