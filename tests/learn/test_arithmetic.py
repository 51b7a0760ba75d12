"""Counts of tokens, operations and bytes against cases that are small enough to be counted by hand."""

import pytest

from minivllm.errors import InvalidOption
from minivllm.learn.arithmetic import Cost, Sizes, step_cost, total
from minivllm.learn.desk import Desk, Request
from minivllm.learn.meter import Meter
from minivllm.learn.roofline import Roofline
from minivllm.learn.rungs import chosen
from minivllm.learn.workload import Workload

# Two layers of 100 weights, a head of 50; a pair costs 8 operations; K and V of a token are 6 bytes in a layer; 4-byte weights.
SIZES = Sizes(layer_params=200, head_params=50, pair_flops=8, kv_layer_bytes=6, windows=(None, None), itemsize=4)


def test_a_prompt_and_a_token_without_padding() -> None:
    # A prompt of 3 sees 1 + 2 + 3 tokens, the fifth token of another row sees 5; in each of two layers.
    cost = step_cost(SIZES, [(0, 3), (4, 1)], num_logits=2)
    assert cost == Cost(
        calls=1,
        tokens=4,
        flops=2 * (200 * 4 + 50 * 2) + 8 * 2 * (6 + 5),
        weight_bytes=250 * 4,
        kv_bytes=(3 + 5) * 2 * 6 + 4 * 12,  # read, and written
    )


def test_a_chunk_that_gives_no_token_does_not_read_the_head() -> None:
    cost = step_cost(SIZES, [(0, 3)], num_logits=0)
    assert (cost.weight_bytes, cost.flops) == (800, 2 * 200 * 3 + 8 * 2 * 6)


def test_a_window_bounds_what_a_token_sees() -> None:
    sizes = Sizes(200, 50, 8, 6, (2, None), 4)
    cost = step_cost(sizes, [(3, 2)], num_logits=1)  # positions 3 and 4: 2 + 2 tokens in one layer, 4 + 5 in the other
    assert cost.flops == 2 * (200 * 2 + 50) + 8 * (4 + 9)
    assert cost.kv_bytes == (3 + 5) * 6 + 2 * 12  # two queries of a window of two see three keys


def test_a_prompt_of_the_plain_model() -> None:
    meter = Meter(SIZES)
    meter.call([(0, 3)], 0, 3, kept=True)
    # A plain product computes 3 x 3 pairs, whatever the mask hides. K and V of 3 tokens are written and read.
    assert meter.costs == [Cost(1, 3, 0, 2 * (200 * 3 + 50) + 8 * 2 * 9, 1000, 6 * 12, 0)]


def test_what_is_not_kept_moves_no_cache() -> None:
    meter = Meter(SIZES)
    meter.call([(0, 3)], 0, 3, kept=False)
    assert (meter.costs[0].kv_bytes, meter.costs[0].kv_padding_bytes) == (0, 0)


def test_a_padded_prompt() -> None:
    meter = Meter(SIZES)
    meter.call([(0, 4), (0, 1)], 0, 4, kept=True)
    cost = meter.costs[0]
    assert (cost.tokens, cost.padding) == (8, 3)
    assert cost.flops == 2 * (200 * 8 + 50 * 2) + 8 * 2 * 8 * 4
    assert (cost.kv_bytes, cost.kv_padding_bytes) == (16 * 12, 6 * 12)  # 8 written and 8 read; 3 of either for nothing


def test_a_step_of_a_padded_batch() -> None:
    meter = Meter(SIZES)
    meter.call([(3, 1), (1, 1)], 3, 1, kept=True)
    cost = meter.costs[0]
    assert (cost.tokens, cost.padding) == (2, 0)
    # 2 x 3 old columns are read and written elsewhere, 2 new ones written, 2 x 4 read; 2 old ones are padding in each.
    assert (cost.kv_bytes, cost.kv_padding_bytes) == ((12 + 2 + 8) * 12, (4 + 2) * 12)


def test_a_finished_row_is_padding_as_a_whole() -> None:
    meter = Meter(SIZES)
    meter.call([(2, 1), (2, 0)], 2, 1, kept=True)
    cost = meter.costs[0]
    assert (cost.tokens, cost.padding) == (2, 1)
    # Moved: 2 x 2 x 2 copied, 2 written, 2 x 3 read. For nothing: its 2 old columns three times, its new one twice.
    assert (cost.kv_bytes, cost.kv_padding_bytes) == ((8 + 2 + 6) * 12, (4 + 2 + 1 + 1) * 12)


def test_stacking_copies_and_pads() -> None:
    meter = Meter(SIZES)
    meter.stacked([5, 2, 3])
    assert meter.costs == [Cost(kv_bytes=(10 + 15) * 12, kv_padding_bytes=5 * 12)]


def test_costs_add_up() -> None:
    assert total([Cost(1, 2, 3, 4, 5, 6, 7), Cost(10, 20, 30, 40, 50, 60, 70)]) == Cost(11, 22, 33, 44, 55, 66, 77)
    assert total([]) == Cost()
    assert Cost(weight_bytes=5, kv_bytes=6).bytes_moved == 11


def test_the_roofline_takes_the_slower_of_both() -> None:
    roof = Roofline(flops_per_s=100.0, bytes_per_s=10.0)
    assert roof.ridge == 10.0
    assert roof.least_s(200, 10) == 2.0
    assert roof.least_s(200, 50) == 5.0
    assert roof.best(None) == roof
    assert roof.best(Roofline(50.0, 20.0)) == Roofline(100.0, 20.0)


class Clock:
    """A clock that only sleeping moves. Written by its own ``sleep``, and by tests."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("minivllm.learn.desk.time", clock)
    return clock


def asked(*arrivals_s: float) -> list[Request]:
    return [Request(str(i), (1, 2), 3, s) for i, s in enumerate(arrivals_s)]


def test_the_desk_hands_out_in_order_of_arrival(clock: Clock) -> None:
    desk = Desk(asked(0.5, 0.0, 60.0), 600.0)
    assert [r.id for r in desk.take(8, wait=False)] == ["1"]
    assert desk.take(0) == []
    assert desk.take(8, wait=False) == []
    assert clock.now_s == 100.0
    assert [r.id for r in desk.take(8)] == ["0"]  # waits for it, and not for the next
    assert clock.now_s == 100.5
    assert desk.open


def test_when_the_time_is_over_no_more_are_handed_out_and_later_texts_are_cut(clock: Clock) -> None:
    desk = Desk(asked(0.0, 0.0, 0.0), 10.0)
    clock.sleep(11.0)
    assert desk.open  # not before the first
    first, second = desk.take(2)
    assert not desk.open
    assert desk.take(2) == []
    desk.tell(first, 5)
    assert not first.done
    clock.sleep(10.0)
    desk.tell(first, 6)
    assert (first.output, first.cut, first.done) == ([5, 6], True, True)
    second.output = [1, 2]
    desk.tell(second, 3)
    assert (second.cut, second.done) == (False, True)  # it has all of its tokens


def test_the_desk_times_tokens_without_idle_time(clock: Clock) -> None:
    desk = Desk(asked(2.0), 600.0)
    clock.sleep(0.5)
    (request,) = desk.take(1)
    clock.sleep(0.25)
    desk.tell(request, 7)
    assert (request.output, request.text, request.done) == ([7], [1, 2, 7], False)
    assert request.told_s == [2.25]
    assert desk.busy_s == 0.75  # of the 2.25 s, 1.5 were slept


def test_the_workload_is_what_was_asked_for() -> None:
    workload = Workload(num_requests=6, num_prefixes=2, prefix_len=4, input_len=10, output_len=8, spread=0.5, request_rate=2.0)
    requests = workload.requests(50, {0, 1})
    assert requests == workload.requests(50, {0, 1})
    assert {r.prompt[:4] for r in requests[::2]} == {requests[0].prompt[:4]} != {r.prompt[:4] for r in requests[1::2]}
    assert all(4 + 5 <= len(r.prompt) <= 4 + 15 and 4 <= r.num_output <= 12 for r in requests)
    assert all(2 <= token < 50 for r in requests for token in r.prompt)
    assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert workload.longest == 4 + 15 + 12
    with pytest.raises(InvalidOption, match="do not fit the model's context of 30"):
        workload.check_fits(30)


def test_rungs_are_chosen_by_name_and_range() -> None:
    assert [r.name for r in chosen("0,3-5")] == ["0", "3", "4", "4k", "5"]
    assert [r.name for r in chosen("8,4k")] == ["4k", "8"]
    for text in ("9", "", "5-3", "a-b", "1-", "-"):
        with pytest.raises(InvalidOption, match="is not a rung or a range"):
            chosen(text)
