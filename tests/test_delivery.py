"""How text reaches its readers: what waits for whom, that nothing is lost or out of order, and that it stays small."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from fake_engine import fake_engine
from token_runner import expected_tokens

from minivllm.async_llm import AsyncLLM, Order
from minivllm.config import Config, make_config
from minivllm.delivery import LONGEST_WAIT_S, MOST_UNMERGED, Mailbox, Pacer, merged, share_of
from minivllm.engine.client import LocalClient
from minivllm.errors import EngineDead, GenerationFailed, InvalidRequest
from minivllm.observe.metrics import Metrics
from minivllm.records import EngineOutput
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import FinishReason, RequestOutput, SamplingParams, TokenEvent

VOCAB_SIZE = 97


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Patience:
    """A pacer that says when a test wants it to."""

    def __init__(self, wait_s: float) -> None:
        self.rest_s = wait_s
        self.rounds = 0

    def wait_s(self) -> float:
        return self.rest_s

    def begin(self) -> None:
        self.rounds += 1


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


def output(name: str, number: int, reason: FinishReason | None = None, error: str | None = None) -> RequestOutput:
    """The ``number``-th token of a request, counted from 1."""
    return RequestOutput(
        id=name, text=f"{name}{number} ", token_ids=(number,), finish_reason=reason, num_output=number, error=error
    )


@dataclass
class Owner:
    """What an ``AsyncLLM`` is to its mailboxes."""

    closed: list[list[str]] = field(default_factory=list)  # what was still running in those that were left
    steered: list[tuple[str, list[str]]] = field(default_factory=list)
    config: Config = field(default_factory=lambda: make_config(slow_reader_pause_s=0.02))

    def forget(self, _: Sequence[str], running: Sequence[str]) -> None:
        self.closed.append(list(running))

    def pause(self, ids: Sequence[str]) -> None:
        self.steered.append(("pause", list(ids)))

    def resume(self, ids: Sequence[str]) -> None:
        self.steered.append(("resume", list(ids)))


def mailbox(*names: str) -> tuple[Mailbox, list[list[str]]]:
    """A mailbox, and what it will say is still running when it is closed."""
    owner = Owner()
    return Mailbox(names, owner), owner.closed  # type: ignore[arg-type]


def test_what_runs_is_paused_while_nobody_reads() -> None:
    async def scene() -> None:
        owner = Owner()
        box = Mailbox(("a", "b", "c"), owner)  # type: ignore[arg-type]
        box.put(output("a", 1, "stop"))
        reads = asyncio.Event()

        async def read() -> None:
            await reads.wait()

        waiting = asyncio.create_task(box.outwait(read))
        while not owner.steered:
            await asyncio.sleep(0.005)
        assert owner.steered == [("pause", ["b", "c"])]
        box.put(output("b", 1, "stop"))  # was in flight
        reads.set()
        await waiting
        assert owner.steered[1:] == [("resume", ["b", "c"])]
        await box.outwait(read)  # reads at once
        gone = asyncio.create_task(box.outwait(asyncio.Event().wait))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.wait({gone})
        assert owner.steered[2:] == [("pause", ["c"])]  # whoever goes does not let it run once more

    asyncio.run(scene())


def test_a_stalled_reader_costs_one_output() -> None:
    box, _ = mailbox("a")
    for number in range(1, 10_001):
        box.put(output("a", number))
    assert len(box._ready[0]) <= MOST_UNMERGED
    ((_, merged_output),) = box.take()
    assert merged_output.token_ids == tuple(range(1, 10_001))


# ------------------------------------------------------------------------------------------------------------------ pacing


def test_a_round_may_begin_when_the_loop_has_rested_in_proportion_to_its_work() -> None:
    wall, cpu = Clock(), Clock()
    pacer = Pacer(0.1, wall, cpu)
    assert pacer.wait_s() <= 0  # nothing went out yet
    pacer.begin()
    cpu.now_s += 0.001
    wall.now_s += 0.004
    assert pacer.wait_s() == pytest.approx(0.006)
    wall.now_s += 0.006
    assert pacer.wait_s() == pytest.approx(0.0)
    cpu.now_s += 0.0005  # whatever else the loop does counts too
    assert pacer.wait_s() == pytest.approx(0.005)


def test_no_token_waits_longer_than_the_limit() -> None:
    wall, cpu = Clock(), Clock()
    pacer = Pacer(0.1, wall, cpu)
    pacer.begin()
    cpu.now_s += 60.0
    assert pacer.wait_s() == pytest.approx(LONGEST_WAIT_S)
    wall.now_s += LONGEST_WAIT_S
    assert pacer.wait_s() <= 1e-9


def test_few_streams_never_wait() -> None:
    """A round of four streams costs under 0.2 ms, and no step of a model takes less than 2 ms."""
    wall, cpu = Clock(), Clock()
    pacer = Pacer(0.1, wall, cpu)
    for _ in range(100):
        pacer.begin()
        cpu.now_s += 0.0002
        wall.now_s += 0.002
        assert pacer.wait_s() <= 1e-9


@pytest.mark.parametrize(
    ("cores", "threads", "device", "share"),
    [(2, None, "cpu", 0.1), (2, 2, "cpu", 0.1), (2, 1, "cpu", 0.5), (1, None, "cpu", 0.05), (64, None, "cpu", 0.5),
     (2, None, "cuda:0", 0.5)],
)  # fmt: skip
def test_text_goes_out_less_often_only_where_the_model_wants_every_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int | None, device: str, share: float
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert share_of(make_config(num_threads=threads), device) == pytest.approx(share)


# --------------------------------------------------------------------------------------------------------------- a mailbox


def test_outputs_of_each_request_stay_in_order_and_are_merged() -> None:
    box, _ = mailbox("a", "b")
    urgent = [box.put(output(name, number)) for number in (1, 2, 3) for name in ("b", "a")]
    assert urgent == [True, True, False, False, False, False]  # the first of each
    taken = dict(box.take())
    assert {i: o.text for i, o in taken.items()} == {0: "a1 a2 a3 ", 1: "b1 b2 b3 "}
    assert {i: (o.token_ids, o.num_output) for i, o in taken.items()} == {0: ((1, 2, 3), 3), 1: ((1, 2, 3), 3)}
    assert box.take() == []
    assert box.put(output("a", 4, "stop"))
    assert box.more
    ((index, last),) = box.take()
    assert (index, last.finish_reason) == (0, "stop")
    assert box.more  # b goes on
    box.put(output("b", 4, "length"))
    box.take()
    assert not box.more


def test_a_reader_that_never_takes_costs_little_more_than_its_text() -> None:
    box, _ = mailbox("a")
    for number in range(1, 1001):
        box.put(output("a", number))
        assert max(len(outputs) for outputs in box._ready.values()) < MOST_UNMERGED
    ((_, whole),) = box.take()
    assert whole.text == "".join(f"a{n} " for n in range(1, 1001))
    assert whole.token_ids == tuple(range(1, 1001))


def test_leaving_ends_what_still_runs() -> None:
    box, closed = mailbox("a", "b", "c")
    with box:
        box.put(output("b", 1, "length"))
    assert closed == [["a", "c"]]


def test_what_came_before_an_error_is_taken_before_it() -> None:
    box, closed = mailbox("a", "b")
    with pytest.raises(GenerationFailed, match="not finite"), box:
        box.put(output("b", 1))
        assert box.put(output("a", 1, "error", error="logits were not finite"))
        assert [o.text for _, o in box.take()] == ["b1 "]
        assert box.more
        box.take()
    assert closed == [["b"]]  # the engine has ended the other itself


def test_the_first_error_is_told() -> None:
    box, _ = mailbox("a")
    box.put(output("a", 1, "error", error="first"))
    box.fail(EngineDead())
    with pytest.raises(GenerationFailed, match="first"):
        box.take()


def test_a_reader_wakes_for_what_is_there_and_for_nothing_else() -> None:
    async def scene() -> None:
        box, _ = mailbox("a")
        reader = asyncio.create_task(box.wait())
        await asyncio.sleep(0)
        box.wake()
        await asyncio.sleep(0)
        assert not reader.done()  # there was nothing
        box.put(output("a", 1))
        await asyncio.sleep(0)
        assert not reader.done()  # nobody woke it
        box.wake()
        await reader
        await box.wait()  # what is there already is not waited for

    asyncio.run(scene())


def test_who_wants_whole_answers_wakes_once() -> None:
    async def scene() -> None:
        box, _ = mailbox("a", "b")
        reader = asyncio.create_task(box.whole())
        for name, number, reason in (("b", 1, None), ("b", 2, "stop"), ("a", 1, None)):
            await asyncio.sleep(0)
            box.put(output(name, number, reason))  # type: ignore[arg-type]
            box.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not reader.done()
        box.put(output("a", 2, "length"))
        box.wake()
        assert [(o.text, o.finish_reason) for o in await reader] == [("a1 a2 ", "length"), ("b1 b2 ", "stop")]

    asyncio.run(scene())


def test_one_failure_ends_the_wait_for_whole_answers() -> None:
    async def scene() -> None:
        box, _ = mailbox("a", "b")
        reader = asyncio.create_task(box.whole())
        await asyncio.sleep(0)
        box.put(output("b", 1, "stop"))
        box.fail(EngineDead())
        with pytest.raises(EngineDead):
            await reader

    asyncio.run(scene())


def test_merging_one_output_gives_it_back() -> None:
    one = output("a", 1)
    assert merged([one]) is one


# -------------------------------------------------------------------------------------- AsyncLLM with rounds that are far apart


class SteppedClient(LocalClient):
    """An engine that goes on by a step when a test says so."""

    def __init__(self, max_num_seqs: int = 8) -> None:
        super().__init__(fake_engine(VOCAB_SIZE, max_num_seqs=max_num_seqs))
        self._may = asyncio.Semaphore(0)

    async def outputs(self) -> EngineOutput:
        while True:
            await self._may.acquire()
            if (message := self._turn()) is not None:
                return message

    async def step(self, times: int = 1) -> None:
        """Step, and let everybody do what follows from it."""
        for _ in range(times):
            self._may.release()
            for _ in range(6):
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(tokenizer: Tokenizer, wait_s: float, **options: object) -> AsyncIterator[tuple[AsyncLLM, SteppedClient]]:
    client = SteppedClient()
    pacer = Patience(wait_s)
    llm = AsyncLLM(client, tokenizer, make_config(**options), Metrics("test"), pacer)  # type: ignore[arg-type]
    task = asyncio.create_task(llm.run())
    try:
        yield llm, client
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def greedy(max_tokens: int = 8, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, seed=0, **more)  # type: ignore[arg-type]


async def read(llm: AsyncLLM, name: str, prompt: tuple[int, ...], sampling: SamplingParams) -> list[RequestOutput]:
    return [o async for o in llm.generate(name, prompt, sampling)]


def test_between_rounds_only_first_tokens_and_ends_go_out(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, wait_s=3600.0) as (llm, client):
            long = asyncio.create_task(read(llm, "long", (1, 2, 3), greedy(6)))
            await asyncio.sleep(0)
            await client.step(3)
            short = asyncio.create_task(read(llm, "short", (4, 5), greedy(2)))
            await asyncio.sleep(0)
            await client.step(2)
            assert [len(o.token_ids) for o in await short] == [1, 1]
            assert not long.done()
            await client.step(2)
            pieces = await long
            assert [len(o.token_ids) for o in pieces] == [1, 5]
            assert [t for o in pieces for t in o.token_ids] == expected_tokens((1, 2, 3), 6, VOCAB_SIZE, 0, frozenset())
            assert "".join(o.text for o in pieces) == tokenizer.decode([t for o in pieces for t in o.token_ids])

    asyncio.run(scene())


def test_held_text_goes_out_when_its_round_begins_though_the_engine_is_silent(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, wait_s=0.02) as (llm, client):
            outputs = llm.generate("a", (1, 2, 3), greedy(9))
            first = asyncio.create_task(anext(outputs))
            await asyncio.sleep(0)
            await client.step()
            assert len((await first).token_ids) == 1
            waiting = asyncio.create_task(anext(outputs))
            await client.step(2)
            assert not waiting.done()
            assert len((await asyncio.wait_for(waiting, 20)).token_ids) == 2
            await outputs.aclose()
            assert llm.num_open == 0

    asyncio.run(scene())


def test_without_a_wait_every_token_goes_out_alone(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, wait_s=0.0) as (llm, client):
            tasks = [asyncio.create_task(read(llm, f"r{i}", (1, i + 2), greedy(7))) for i in range(4)]
            await asyncio.sleep(0)
            await client.step(8)
            for task in tasks:
                assert [len(o.token_ids) for o in await task] == [1] * 7

    asyncio.run(scene())


def test_a_stop_string_is_seen_when_it_comes_and_not_when_it_goes_out(tokenizer: Tokenizer) -> None:
    ids = expected_tokens((1, 2, 3), 60, VOCAB_SIZE, 0, frozenset())
    stop = tokenizer.decode(ids)[20:23]

    async def scene() -> None:
        async with serving(tokenizer, wait_s=3600.0) as (llm, client):
            task = asyncio.create_task(read(llm, "a", (1, 2, 3), greedy(60, stop=(stop,))))
            await asyncio.sleep(0)
            steps = 0
            while not task.done():
                await client.step()
                steps += 1
            last = (await task)[-1]
            assert (last.finish_reason, last.stop_reason, last.num_output) == ("stop", stop, steps)
            assert steps < 60

    asyncio.run(scene())


def random_waits() -> Iterator[float]:
    """Rounds now, soon and later, in turn."""
    for number in count():
        yield (0.0, 0.003, 0.0005, 0.02)[number % 4]


def test_any_pace_gives_the_same_tokens_and_text(tokenizer: Tokenizer) -> None:
    class Whims(Patience):
        def __init__(self) -> None:
            super().__init__(0.0)
            self._waits = random_waits()

        def wait_s(self) -> float:
            return next(self._waits)

    async def scene() -> int:
        client = LocalClient(fake_engine(VOCAB_SIZE))
        llm = AsyncLLM(client, tokenizer, make_config(), Metrics("test"), Whims())  # type: ignore[arg-type]
        task = asyncio.create_task(llm.run())
        prompts = [tuple(range(5, 6 + i)) for i in range(30)]
        replies = await asyncio.gather(*(read(llm, f"r{i}", p, greedy(3 + i)) for i, p in enumerate(prompts)))
        task.cancel()
        for i, pieces in enumerate(replies):
            ids = [t for o in pieces for t in o.token_ids]
            assert ids == expected_tokens(prompts[i], 3 + i, VOCAB_SIZE, 0, frozenset())
            assert "".join(o.text for o in pieces) == tokenizer.decode(ids)
            assert [o.num_output for o in pieces] == sorted({o.num_output for o in pieces})
            assert pieces[-1].num_output == len(ids)
            assert [o.finish_reason for o in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert llm.num_open == 0
        assert llm.metrics.generation_tokens == sum(3 + i for i in range(30))
        return sum(len(pieces) for pieces in replies)

    assert asyncio.run(scene()) < sum(3 + i for i in range(30))


def test_all_of_a_callers_orders_are_taken_or_none(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, 0.0) as (llm, _):
            good = [Order(f"a{i}", (1, 2), greedy()) for i in range(3)]
            for bad, error in (
                (Order("b", (1 << 20,), greedy()), InvalidRequest),
                (Order("a0", (1,), greedy()), InvalidRequest),
            ):
                with pytest.raises(error):
                    llm.open([good[0], bad])
                assert llm.num_open == 0
            with llm.open(good):
                assert llm.num_open == 3
            assert llm.num_open == 0

    asyncio.run(scene())


def test_a_dead_engine_is_told_after_what_was_held(tokenizer: Tokenizer) -> None:
    class Dying(SteppedClient):
        async def outputs(self) -> EngineOutput:
            message = await super().outputs()
            if any(isinstance(e, TokenEvent) and e.id == "a" for e in message.events) and self.told:
                raise EngineDead
            return message

        told = False

    async def scene() -> None:
        client = Dying()
        llm = AsyncLLM(client, tokenizer, make_config(), Metrics("test"), Patience(3600.0))  # type: ignore[arg-type]
        task = asyncio.create_task(llm.run())
        pieces: list[int] = []

        async def reader() -> None:
            async for piece in llm.generate("a", (1, 2), greedy(50)):
                pieces.append(len(piece.token_ids))  # noqa: PERF401 - what came before the error is kept

        reading = asyncio.create_task(reader())
        await asyncio.sleep(0)
        await client.step(5)
        client.told = True
        await client.step()
        with pytest.raises(EngineDead):
            await reading
        assert pieces == [1, 4]
        await task

    asyncio.run(scene())
