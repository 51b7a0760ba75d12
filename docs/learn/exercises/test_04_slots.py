"""Exercise 4: find a token in a paged cache.

Write two functions. ``slots(table, start, count, block_size)``: the KV slots of the positions start .. start + count - 1,
where slot number b * block_size + i is place i of block b. ``gather(cache, table, length)``: the K (or V) of a text's first
``length`` tokens, [length, dim], out of a cache [num_blocks, block_size, dim].
"""

from types import ModuleType

import numpy as np
import pytest

from minivllm.learn import scenes
from minivllm.learn.draw_blocks import frames


@pytest.mark.parametrize(
    ("table", "start", "count", "expected"),
    [([3], 0, 2, [12, 13]), ([5, 2], 3, 3, [23, 8, 9]), ([7, 1, 4], 4, 8, [4, 5, 6, 7, 16, 17, 18, 19]), ([2], 1, 0, [])],
)
def test_slots(solution: ModuleType, table: list[int], start: int, count: int, expected: list[int]) -> None:
    assert list(solution.slots(table, start, count, 4)) == expected


def test_what_was_written_is_found(solution: ModuleType) -> None:
    """Texts of a run of the engine are written token by token, with its own block tables."""
    rng = np.random.default_rng(0)
    records = scenes.paged()
    cache = np.zeros((records[-1].blocks_total + 1, scenes.BLOCK, 3))
    flat = cache.reshape(-1, 3)
    texts: dict[str, list[np.ndarray]] = {}
    steps = [record for record in records if record.rows]
    for record, frame in zip(steps, frames(records, scenes.BLOCK), strict=True):
        for row in record.rows:
            new = rng.normal(size=(row.num_tokens, 3))
            flat[list(solution.slots(list(frame.tables[row.id]), row.start, row.num_tokens, scenes.BLOCK))] = new
            texts.setdefault(row.id, []).extend(new)
        for row in record.rows:
            found = solution.gather(cache, list(frame.tables[row.id]), row.start + row.num_tokens)
            np.testing.assert_array_equal(found, np.array(texts[row.id]))
