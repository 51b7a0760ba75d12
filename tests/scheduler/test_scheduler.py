"""The scheduler's promises, one by one, with a runner that notices every mistake in blocks and positions."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scheduler_bench import VOCAB, Bench
from token_runner import expected_tokens

from minivllm.errors import ContextTooLong, InvalidRequest, OutOfDeviceMemory, RequestFault
from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Limits
from minivllm.scheduler.planner import MAX_OVERTAKEN
from minivllm.scheduler.request import MAX_EVICTIONS, Took
from minivllm.scheduler.room import GOOD_STEPS, StepRoom
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import GenerateRequest, SamplingParams, StepPlan


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    head = tuple(int(t) for t in rng.integers(0, VOCAB, shared))
    return [head + tuple(int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("policy", ["mixed", "prefill-first", "separate"])
@pytest.mark.parametrize("num_blocks", [65, 20])
def test_every_schedule_gives_the_text_of_each_request_alone(overlap: int, drafts: int, policy: str, num_blocks: int) -> None:
    bench = Bench(num_blocks, overlap, batching_policy=policy, num_draft_tokens=drafts, max_model_len=70)
    for i, prompt in enumerate(prompts(24, shared=9)):
        bench.add(f"r{i}", prompt, max_tokens=1 + i)
        bench.step()
    bench.run()
    bench.expect_all()
    bench.assert_idle()
    assert sum(r.prefix_hits for r in bench.records) > 0
    if num_blocks == 20:
        assert sum(len(r.preempted) for r in bench.records) > 0


def test_a_long_prompt_runs_in_chunks_beside_decodes() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add("short", (1, 2, 3), 20)
    bench.step()
    bench.add("long", tuple(range(90)), 4)
    bench.run()
    bench.expect_all()
    mixed = [r for r in bench.records if {row.kind for row in r.rows} == {"prefill", "decode"}]
    assert len(mixed) >= 6
    assert all(sum(row.num_tokens for row in r.rows) <= 16 for r in bench.records)


def test_separate_never_mixes_and_prefill_first_plans_prompts_first() -> None:
    for policy in ("separate", "prefill-first"):
        bench = Bench(batching_policy=policy, max_num_batched_tokens=16)
        bench.add("a", (1, 2, 3), 20)
        bench.step()
        bench.add("b", tuple(range(40)), 4)
        bench.run()
        bench.expect_all()
        kinds = [[row.kind for row in r.rows] for r in bench.records]
        if policy == "separate":
            assert all(len(set(k)) <= 1 for k in kinds)
        else:
            assert all(k == sorted(k, reverse=True) for k in kinds)
            assert any(len(set(k)) == 2 for k in kinds)


def test_requests_of_one_step_share_their_prompt() -> None:
    bench = Bench()
    for i in range(4):
        bench.add(f"r{i}", tuple(range(17)), 3)
    bench.step()
    assert bench.records[0].prefix_hits == 3 * 16
    assert bench.kv.counts().referenced == 4 + 4  # four shared blocks, a tail for each
    bench.run()
    bench.expect_all()


def test_salts_keep_tenants_apart() -> None:
    bench = Bench()
    bench.add("a", tuple(range(17)), 3, cache_salt="a")
    bench.add("b", tuple(range(17)), 3, cache_salt="b")
    bench.run()
    assert sum(r.prefix_hits for r in bench.records) == 0


def test_a_request_that_can_never_fit_is_refused_at_the_door() -> None:
    bench = Bench(num_blocks=9)  # 32 tokens
    with pytest.raises(ContextTooLong, match="32 tokens"):
        bench.add("big", tuple(range(30)), 10)
    bench.add("fits", tuple(range(28)), 4)
    bench.run()
    bench.expect_all()


def test_an_id_is_used_once_at_a_time() -> None:
    bench = Bench()
    bench.add("a", (1,), 3)
    with pytest.raises(InvalidRequest, match="id"):
        bench.add("a", (1,), 3)


@pytest.mark.parametrize("field", [{"lora": "a"}, {"output": "pooled"}, {"deadline_s": 1.0}])
def test_what_the_types_can_say_and_nobody_serves_yet_is_refused(field: dict[str, object]) -> None:
    bench = Bench()
    with pytest.raises(InvalidRequest, match="not served"):
        bench.add("a", (1, 2), 3, **field)
    bench.assert_idle()


def test_a_request_that_does_not_fit_now_neither_blocks_nor_starves() -> None:
    bench = Bench(num_blocks=17, max_model_len=64)  # 64 tokens
    bench.add("holder", tuple(range(20)), 40)
    bench.step()
    bench.add("big", tuple(range(50, 90)), 8)
    for i in range(3 * MAX_OVERTAKEN):
        bench.add(f"small{i}", (i % VOCAB, 1, 2), 2)
    done: list[str] = []
    while bench.engine.has_work:
        bench.step()
        done = [e.id for e in bench.events if e.finish_reason]
    bench.expect_all()
    before = done.index("big")
    assert before > 0, "small requests behind it ran first"
    assert sum(name.startswith("small") for name in done[:before]) <= MAX_OVERTAKEN + bench.limits.max_num_seqs


@pytest.mark.parametrize("overlap", [0, 1])
def test_priority_orders_the_queue_and_names_the_victim(overlap: int) -> None:
    bench = Bench(num_blocks=13, max_model_len=40, overlap=overlap, scheduling_policy="priority", max_num_seqs=2)
    bench.add("low", tuple(range(8)), 20, priority=5)
    bench.add("mid", tuple(range(8, 16)), 20, priority=1)
    bench.add("high", tuple(range(16, 24)), 20, priority=0)
    bench.run()
    bench.expect_all()
    finished = [e.id for e in bench.events if e.finish_reason]
    assert finished == ["high", "mid", "low"]


@pytest.mark.parametrize("overlap", [0, 1])
def test_aborts_free_their_blocks_before_the_next_step(overlap: int) -> None:
    bench = Bench(overlap=overlap)
    for i, prompt in enumerate(prompts(12)):
        bench.add(f"r{i}", prompt, 10)
    for _ in range(3):
        bench.step()
    held = bench.kv.counts().referenced
    bench.engine.abort([f"r{i}" for i in range(12)])
    assert held > 0
    assert bench.kv.counts().referenced == 0
    bench.run()
    bench.assert_idle()
    assert [t.reason for r in bench.records for t in r.finished] == ["abort"] * 12


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("drafts", [0, 3])
def test_stop_tokens_end_a_request_and_surplus_is_dropped(overlap: int, drafts: int) -> None:
    bench = Bench(overlap=overlap, num_draft_tokens=drafts)
    for i, prompt in enumerate(prompts(8)):
        bench.add(f"r{i}", prompt, 40, sampling={"stop_token_ids": tuple(range(0, VOCAB, 9))})
    bench.run()
    bench.expect_all()
    last = [e for e in bench.events if e.finish_reason]
    assert {e.finish_reason for e in last} == {"stop"}
    assert all(e.stop_reason == e.token_ids[-1] for e in last)


def test_min_tokens_holds_back_the_end() -> None:
    bench = Bench(eos_token_ids=tuple(range(VOCAB)))
    bench.add("a", (1, 2), 9, sampling={"ignore_eos": False, "min_tokens": 5})
    bench.run()
    assert len(bench.text("a")) == 6
    assert bench.events[-1].stop_reason is None


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_failed_step_is_computed_again_without_a_trace(overlap: int) -> None:
    bench = Bench(overlap=overlap)
    bench.runner.fail_steps = {0, 5}
    for i, prompt in enumerate(prompts(6, shared=9)):
        bench.add(f"r{i}", prompt, 4)
    bench.run()
    assert not [e for e in bench.events if e.error]
    bench.expect_all()
    bench.assert_idle()


def test_a_step_that_always_fails_ends_its_requests_with_an_error() -> None:
    bench = Bench()
    bench.runner.fail_steps = set(range(100))
    bench.add("a", (1, 2, 3), 4)
    bench.run()
    assert [(e.finish_reason, bool(e.error)) for e in bench.events] == [("error", True)]
    bench.assert_idle()


class AnyText:
    """A guide that takes every token, and breaks when it is asked about the one of number ``breaks_at``."""

    problem = ""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.told, self.seen, self.breaks_at = 0, [], breaks_at

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        return ()

    def tell(self, token_ids: Sequence[int]) -> None:
        self.told = len(token_ids)
        self.seen += token_ids

    def took(self) -> tuple[int, Took]:
        if len(self.seen) == self.breaks_at:
            raise RuntimeError("a fault of ours")
        count, self.told = self.told, 0
        return count, "more"


class NoMasks:
    def masks(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_guide_that_breaks_ends_its_own_text(overlap: int) -> None:
    """A step is told to all guides before any is asked; those behind the one that breaks are asked all the same."""
    bench = Bench(overlap=overlap)
    bench.engine._grammars = NoMasks()  # type: ignore[assignment]
    guides = [AnyText(breaks_at=3), AnyText(), None, AnyText()]
    for name, guide in zip("abcd", guides, strict=True):
        if name == "d":
            for _ in range(20):
                bench.step()
        request = GenerateRequest(
            id=name, prompt_ids=(1, 2, ord(name)), sampling=SamplingParams(max_tokens=6, seed=0, ignore_eos=True), arrival_s=0.0
        )
        bench.scheduler.add(request, guide)
    bench.run()
    assert {e.id: bool(e.error) for e in bench.events if e.finish_reason} == {"a": True, "b": False, "c": False, "d": False}
    for name in "bcd":
        assert bench.text(name) == expected_tokens((1, 2, ord(name)), 6, VOCAB, 0, frozenset())
    assert guides[3] is not None and guides[3].seen == bench.text("d")
    bench.assert_idle()


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("memory", [{"memory_tokens": 20}, {"memory_rows": 2}, {"memory_tokens": 16, "memory_rows": 1}])
def test_out_of_memory_makes_steps_smaller_and_costs_no_token(overlap: int, memory: dict[str, int]) -> None:
    bench = Bench(overlap=overlap)
    for name, value in memory.items():
        setattr(bench.runner, name, value)
    for i, prompt in enumerate(prompts(8, shared=9)):
        bench.add(f"r{i}", prompt * 3, 12)
    bench.run()
    assert not [e for e in bench.events if e.error]
    bench.expect_all()
    bench.assert_idle()
    assert any("memory: " in r.rest_waits for r in bench.records) == ("memory_rows" in memory)


class Cursed:
    """Breaks every step that has work for one request."""

    def __init__(self, bench: Bench, name: str, error: Exception) -> None:
        self.bench, self.name, self.error = bench, name, error
        self.steps = 0
        bench.runner.breaks = self

    def __call__(self, plan: StepPlan) -> None:
        live = self.bench.scheduler._book.live
        if any(work.uid in live and live[work.uid].spec.id == self.name for work in plan.work):
            self.steps += 1
            raise self.error


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("error", [ValueError("cursed"), OutOfDeviceMemory("cursed")])
def test_whose_fault_it_was_is_found_out_and_nobody_else_ends(overlap: int, error: Exception) -> None:
    bench = Bench(overlap=overlap, max_num_seqs=16, num_blocks=200)
    cursed = Cursed(bench, "r11", error)
    for i, prompt in enumerate(prompts(16, shared=9)):
        bench.add(f"r{i}", prompt, 12)
        if i % 3 == 0:
            bench.step()
    bench.run()
    del bench.requests["r11"]
    bench.expect_all()
    assert {e.id for e in bench.events if e.error} == {"r11"}
    assert cursed.steps <= 8, "halves of sixteen are few"
    assert not bench.scheduler._room.reduced, "who wanted the memory is gone"
    bench.assert_idle()


@pytest.mark.parametrize("overlap", [0, 1])
def test_several_culprits_of_a_batch_are_all_found(overlap: int) -> None:
    bench = Bench(overlap=overlap)
    live = bench.scheduler._book.live

    def breaks(plan: StepPlan) -> None:
        if any(work.uid in live and live[work.uid].spec.id in ("r2", "r3", "r7") for work in plan.work):
            raise KeyError("cursed")

    bench.runner.breaks = breaks
    for i, prompt in enumerate(prompts(12)):
        bench.add(f"r{i}", prompt, 6)
    bench.run()
    assert {e.id for e in bench.events if e.error} == {"r2", "r3", "r7"}
    for name in ("r2", "r3", "r7"):
        del bench.requests[name]
    bench.expect_all()
    bench.assert_idle()


def test_a_culprit_that_is_named_costs_one_step() -> None:
    bench = Bench()
    failed = []

    def breaks(plan: StepPlan) -> None:
        if any(new.seed == 9 for new in plan.new_rows):
            failed.append(plan.step)
            raise RequestFault(next(new.uid for new in plan.new_rows if new.seed == 9))

    bench.runner.breaks = breaks
    for i, prompt in enumerate(prompts(6)):
        bench.add(f"r{i}", prompt, 6, sampling={"seed": 9} if i == 4 else {})
    bench.run()
    assert len(failed) == 1 and {e.id for e in bench.events if e.error} == {"r4"}
    del bench.requests["r4"]
    bench.expect_all()


def test_steps_that_fail_without_any_request_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.add("a", (1, 2, 3), 4)

    def broken(draft: object) -> None:
        raise AssertionError("nobody's fault")

    monkeypatch.setattr(bench.scheduler._planner, "fill", broken)
    with pytest.raises(RuntimeError, match="none of the requests"):
        for _ in range(10):
            bench.step()


def test_a_result_that_does_not_fit_its_plan_is_a_failed_step() -> None:
    bench = Bench()
    bench.add("a", (1, 2, 3), 4)
    bench.add("b", (4, 5), 4)
    plan = bench.scheduler.schedule(0.0)
    assert plan is not None
    result = bench.runner.launch(plan).result()
    with pytest.raises(ValueError, match="2 rows, but results for 1"):
        bench.scheduler.apply(plan, type(result)(plan.step, result.tokens[:1], result.times), 0.0)
    bench.scheduler.fail(0.0)
    bench.run()
    bench.expect_all()


def test_a_request_gives_way_a_few_times_and_then_runs_to_its_end() -> None:
    """Stronger requests, one after the other, would take its blocks again and again."""
    bench = Bench(num_blocks=17, max_model_len=64, max_num_seqs=2, scheduling_policy="priority")
    bench.add("weak", tuple(range(20)), 40, priority=9)
    live, most, strong = bench.scheduler._book.by_id, 0, 0
    while "weak" in live and strong < 20:
        bench.step()
        weak = live.get("weak")
        if weak is not None and weak.running and len(live) == 1:
            strong += 1
            length = max(1, 4 * (14 - len(bench.kv.held_blocks(weak.uid))) - 3)  # it fits, but soon not beside the weak one
            bench.add(f"strong{strong}", (strong, *range(length)), 62 - length, priority=0)
        most = max(most, 0 if weak is None else weak.evictions)
    assert most == MAX_EVICTIONS
    assert [e.finish_reason for e in bench.events if e.id == "weak"][-1] == "length"
    bench.run()
    bench.expect_all()


def test_memory_that_is_never_enough_ends_the_request() -> None:
    bench = Bench()
    bench.runner.memory_tokens = -1
    bench.add("a", (1, 2, 3), 4)
    bench.run()
    assert [(e.finish_reason, bool(e.error)) for e in bench.events] == [("error", True)]
    bench.assert_idle()


def test_steps_grow_again_after_a_while_without_trouble() -> None:
    room = StepRoom(64, 8)
    while room.shrink():
        assert room.tokens >= room.rows
    assert (room.tokens, room.rows) == (16, 1)
    for _ in range(3 * GOOD_STEPS - 1):
        room.step_was_good()
    assert room.reduced
    room.step_was_good()
    assert (room.tokens, room.rows, room.reduced) == (64, 8, False)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_row_that_is_not_finite_ends_alone_and_its_readers_start_over(overlap: int) -> None:
    bench = Bench(overlap=overlap)
    bench.runner.bad_uids = {0}
    for i in range(4):  # all share the poisoned prompt blocks in the very same step
        bench.add(f"r{i}", tuple(range(17)), 5)
    bench.run()
    del bench.requests["r0"]
    bench.expect_all()
    assert [e.finish_reason for e in bench.events if e.id == "r0"] == ["error"]
    bench.assert_idle()


def test_what_a_reader_of_broken_blocks_wrote_is_not_found_either() -> None:
    bench = Bench()
    bench.runner.bad_uids = {0}
    head, longer = tuple(range(17)), tuple(range(33))
    bench.add("bad", head, 5)
    bench.add("reader", longer, 5)
    bench.run()
    bench.add("later", longer, 5)
    bench.run()
    del bench.requests["bad"]
    bench.expect_all()
    assert {e.id for e in bench.events if e.error} == {"bad"}


def test_a_fork_goes_on_from_its_parents_blocks() -> None:
    bench = Bench()
    bench.add("parent", tuple(range(10)), 12, sampling={"seed": 3})
    for _ in range(3):
        bench.step()
    bench.add("child", tuple(range(10)), 12, sampling={"seed": 4}, fork_of="parent")
    bench.step()
    assert bench.kv.counts().referenced < 2 * bench.kv.blocks_for(12)
    bench.run()
    bench.expect_all()


def test_prior_output_counts_as_output() -> None:
    bench = Bench()
    whole = expected_tokens((1, 2, 3), 10, VOCAB, 0, frozenset())
    bench.add("resumed", (1, 2, 3), 10, prior_output_ids=tuple(whole[:6]))
    bench.run()
    assert bench.text("resumed") == whole[6:]


def test_ledger_stamps_every_token_once() -> None:
    bench = Bench()
    for i, prompt in enumerate(prompts(5)):
        bench.add(f"r{i}", prompt, 6)
    bench.run()
    assert sum(len(r.ttft_s) for r in bench.records) == 5
    assert sum(len(r.itl_s) for r in bench.records) == 5 * 5
    assert sum(r.num_output_tokens for r in bench.records) == 30
    assert sum(r.num_prompt_tokens for r in bench.records) == sum(len(r.prompt_ids) for r in bench.requests.values()) - sum(
        r.prefix_hits for r in bench.records
    )


def test_a_request_alone_in_the_pool_runs_to_its_end() -> None:
    bench = Bench(num_blocks=9)
    bench.add("a", tuple(range(16)), 16)
    bench.add("b", tuple(range(50, 66)), 16)
    bench.run()
    bench.expect_all()


def test_results_must_come_in_order() -> None:
    bench = Bench()
    bench.add("a", (1, 2, 3), 4)
    plan = bench.scheduler.schedule(0.0)
    assert plan is not None
    result = bench.runner.launch(plan).result()
    with pytest.raises(ValueError, match="oldest"):
        bench.scheduler.apply(plan, type(result)(7, result.tokens, result.times), 0.0)


def test_a_step_must_have_room_for_every_row() -> None:
    make: Callable[[], Scheduler] = lambda: Scheduler(Limits(8, 7, 100), Allocator((9,), 4))  # noqa: E731
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        make()
