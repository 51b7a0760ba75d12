"""Requests whose reader does not read: they hold tokens and nothing else, and go on with the same text."""

from concurrent.futures import Future

import msgspec
import pytest
from fake_engine import fake_engine
from token_runner import expected_tokens

from minivllm.engine.engine import Engine
from minivllm.records import EngineOutput
from minivllm.types import GenerateRequest, Grammar, SamplingParams

VOCAB = 31
PROMPT = tuple(range(20))


def request(name: str, max_tokens: int = 12) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return GenerateRequest(id=name, prompt_ids=PROMPT, sampling=sampling, arrival_s=0.0)


class Told:
    """What an engine said. Written by the test that steps it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.last: EngineOutput | None = None

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            output = self.engine.step()
            self.engine.check()
            if output is None:
                continue
            self.last = output
            for event in output.events:
                self.tokens.setdefault(event.id, []).extend(event.token_ids)
                if event.finish_reason:
                    self.ends[event.id] = event.finish_reason

    def finish(self) -> None:
        for _ in range(200):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not come to an end")


@pytest.fixture(params=[0, 1], ids=["depth 0", "depth 1"])
def told(request: pytest.FixtureRequest) -> Told:
    return Told(fake_engine(VOCAB, overlap=request.param))


def test_a_paused_request_holds_nothing_and_goes_on_with_the_same_text(told: Told) -> None:
    told.engine.add(request("a"))
    told.step(4)
    told.engine.pause(["a"])
    told.finish()  # what is in flight comes in; then there is no work
    record = told.last.record if told.last is not None else None
    assert record is not None
    assert (record.num_running, record.num_waiting, record.num_paused, record.blocks_referenced) == (0, 0, 1, 0)
    before = len(told.tokens["a"])
    assert 0 < before < 12
    told.step(5)
    assert len(told.tokens["a"]) == before
    told.engine.resume(["a"])
    assert told.engine.has_work
    told.finish()
    assert told.tokens["a"] == expected_tokens(PROMPT, 12, VOCAB, 1, frozenset())
    assert told.ends == {"a": "length"}


def test_others_run_meanwhile_and_pausing_twice_is_pausing(told: Told) -> None:
    for name in ("a", "b"):
        told.engine.add(request(name))
    told.step(3)
    told.engine.pause(["a", "nobody"])
    told.engine.pause(["a", "a"])
    told.finish()
    assert told.ends == {"b": "length"}
    told.engine.resume(["b", "a", "nobody"])
    told.finish()
    assert told.tokens["a"] == told.tokens["b"] == expected_tokens(PROMPT, 12, VOCAB, 1, frozenset())


def test_a_paused_request_can_be_aborted(told: Told) -> None:
    told.engine.add(request("a"))
    told.step(3)
    told.engine.pause(["a"])
    told.engine.abort(["a"])
    told.finish()
    assert told.last is not None
    assert told.last.record is not None
    assert (told.last.record.num_paused, told.last.record.blocks_referenced) == (0, 0)
    assert not told.ends
    told.engine.add(request("a"))  # its name is free again
    told.finish()
    assert told.ends == {"a": "length"}


def test_one_that_waits_can_be_paused_before_it_ever_ran(told: Told) -> None:
    told.engine.add(request("a"))
    told.engine.pause(["a"])
    assert told.engine.step() is not None  # a record says so
    assert not told.engine.has_work
    told.engine.resume(["a"])
    told.finish()
    assert told.tokens["a"] == expected_tokens(PROMPT, 12, VOCAB, 1, frozenset())


def test_a_token_in_flight_may_end_a_paused_request() -> None:
    told = Told(fake_engine(VOCAB, overlap=1))
    told.engine.add(request("a", max_tokens=1))
    told.step()  # launched; its only token is in flight
    told.engine.pause(["a"])
    told.finish()
    assert told.ends == {"a": "length"}
    assert told.tokens["a"] == expected_tokens(PROMPT, 1, VOCAB, 1, frozenset())


def test_a_failed_step_does_not_wake_a_paused_request() -> None:
    engine = fake_engine(VOCAB, overlap=1)
    told = Told(engine)
    engine.add(request("a"))
    told.step(3)
    engine._executor.fail_steps.add(engine._scheduler._step)  # type: ignore[attr-defined]
    told.step()
    engine.pause(["a"])
    assert engine._in_flight
    num_failed = len(engine._scheduler._ledger.preempted)
    told.finish()
    assert not told.ends
    assert told.last is not None
    assert told.last.record is not None
    assert (told.last.record.num_paused, len(told.last.record.preempted)) == (1, num_failed + 1)
    engine.resume(["a"])
    told.finish()
    assert told.tokens["a"] == expected_tokens(PROMPT, 12, VOCAB, 1, frozenset())


class SlowGrammars:
    """Grammars that are made when the test says so."""

    def __init__(self) -> None:
        self.future: Future[object] = Future()

    def prepare(self, _: Grammar, *, hurries: bool) -> "Future[object]":
        return self.future


class AnyText:
    """A guide that lets everything through."""

    problem = ""

    def take(self, _: int) -> str:
        return "more"

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize("resumed", [False, True])
def test_one_whose_grammar_is_being_made_is_paused_when_it_is_there(resumed: bool) -> None:
    engine, grammars = fake_engine(VOCAB), SlowGrammars()
    engine._grammars = grammars  # type: ignore[assignment]
    wanted = request("a")
    sampling = msgspec.structs.replace(wanted.sampling, grammar=Grammar("regex", "a*"))
    engine.add(msgspec.structs.replace(wanted, sampling=sampling))
    engine.pause(["a"])
    if resumed:
        engine.resume(["a"])
    engine.step()
    grammars.future.set_result(AnyText())
    engine._scheduler.schedule = lambda now: None  # type: ignore[method-assign]  # it is admitted, and that is all
    engine.step()
    assert engine._scheduler.num_waiting == resumed
    assert engine._scheduler.has_work == resumed
    engine.abort(["a"])
    assert not engine._scheduler.has_work
