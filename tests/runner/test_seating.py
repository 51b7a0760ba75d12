"""Who of a step sits where, when rows begin alike."""

import numpy as np
import pytest

from minivllm.attention.base import SharedShape
from minivllm.runner.page import PageLayout, fill
from minivllm.runner.rows import RowStep
from minivllm.runner.seating import MAX_GROUPS, Seater, Seating, most_items
from minivllm.types import SharedPrefix

SHAPE = SharedShape(rows=4, grain=32, least_saved=1)


def seat(groups: tuple[SharedPrefix, ...], rows: list[int], shape: SharedShape = SHAPE) -> Seating | None:
    return Seater(shape, 16, 100).seat(groups, np.array(rows))


def test_groups_are_cut_into_items() -> None:
    groups = (SharedPrefix((1, 2, 3, 5, 8, 13), 5), SharedPrefix((4, 6), 2))
    found = seat(groups, [13, 6, 0, 2, 8, 1, 3, 4, 5])
    assert found is not None
    # 5 blocks are 80 tokens, of which 64 are whole grains; seats follow the group's own order
    assert found.items.tolist() == [[1, 64, 4], [1, 64, 2], [4, 32, 2]]
    assert found.seats.tolist() == [5, 9, -1, 1, 4, 0, 2, 8, 3]


def test_only_rows_of_the_step_are_seated() -> None:
    group = (SharedPrefix((1, 2, 3, 5), 2),)
    found = seat(group, [5, 7, 2])
    assert found is not None
    assert found.items.tolist() == [[2, 32, 2]]  # blocks are read from the table of a row that is there
    assert found.seats.tolist() == [1, -1, 0]
    assert seat(group, [5, 7]) is None
    assert seat((SharedPrefix((5, 7), 1),), [5, 7]) is None  # less than a grain


def test_what_saves_little_is_left() -> None:
    groups = (SharedPrefix(tuple(range(6)), 8),)  # 128 tokens: 6 rows in 2 items save 4 readings
    rows = list(range(6))
    assert seat(groups, rows, SharedShape(4, 32, 4 * 128)) is not None
    assert seat(groups, rows, SharedShape(4, 32, 4 * 128 + 1)) is None


def test_groups_that_save_most_come_first() -> None:
    groups = tuple(SharedPrefix((2 * i, 2 * i + 1), 2 + 2 * (i % 20)) for i in range(20))
    found = seat(groups, list(range(40)))
    assert found is not None
    assert [tokens for _, tokens, _ in found.items.tolist()] == [32 * (20 - i) for i in range(MAX_GROUPS)]


def test_steps_follow_each_other() -> None:
    seater = Seater(SHAPE, 16, 20)
    groups = (SharedPrefix((1, 2, 3), 4),)
    for rows in ([3, 1, 2], [2, 9], [2, 3]):
        found = seater.seat(groups, np.array(rows))
        assert (found is None) == (rows == [2, 9])
    assert seater.seat((), np.array([1, 2, 3])) is None


@pytest.mark.parametrize("num_rows", [1, 5, 64, 100])
def test_there_are_items_enough(num_rows: int) -> None:
    most = most_items(num_rows, SHAPE)
    assert most % 4 == 0 and most >= -(-num_rows // SHAPE.rows) + MAX_GROUPS
    assert most_items(num_rows, None) == 0


def test_the_page_says_who_sits_where() -> None:
    layout = PageLayout(8, most_items(8, SHAPE))
    ones = np.ones(3, dtype=np.int64)
    step = RowStep(np.array([2, 0, 5]), ones, 40 * ones, np.arange(3))
    seating = Seating(np.array([-1, 0, 1], dtype=np.int32), np.array([[0, 32, 2]], dtype=np.int32))
    for given, seats, items in ((seating, [-1, 0, 1], [1, 0, 0, 0, 0, 32, 2]), (None, [-1, -1, -1], [0] * 7)):
        page = np.full(layout.runs, 77, dtype=np.int32)
        fill(page, layout, step, np.zeros((3, 6), dtype=np.int32), 9, given)
        assert page[layout.seats : layout.items].tolist() == seats + [-1] * 5
        assert page[layout.items : layout.items + 7].tolist() == items
    assert layout.items % 4 == layout.runs % 4 == 0
