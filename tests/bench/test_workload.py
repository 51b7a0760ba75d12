"""Workloads: lengths as asked for, the same for the same seed, files checked line by line."""

from pathlib import Path

import pytest

from minivllm.bench.workload import Item, RandomShape, custom_items, random_items
from minivllm.errors import InvalidOption


def test_random_items_have_the_lengths_and_avoid_special_ids() -> None:
    items = random_items(RandomShape(20, 7), 50, vocab_size=30, avoid={0, 5}, seed=1)
    assert {len(i.prompt) for i in items} == {20}
    assert {i.max_tokens for i in items} == {7}
    ids = {t for i in items for t in i.prompt}
    assert ids <= set(range(30)) - {0, 5}
    assert len(ids) > 20


def test_range_ratio_spreads_the_lengths_within_its_bounds() -> None:
    items = random_items(RandomShape(100, 50, range_ratio=0.5), 300, vocab_size=30, avoid=(), seed=1)
    lengths = [len(i.prompt) for i in items]
    assert 50 <= min(lengths) < 70
    assert 130 < max(lengths) <= 150
    assert 25 <= min(i.max_tokens for i in items) <= max(i.max_tokens for i in items) <= 75


def test_a_prefix_is_shared_and_the_rest_is_not() -> None:
    shape = RandomShape(10, 5, prefix_len=6)
    first, second = random_items(shape, 2, vocab_size=1000, avoid=(), seed=1)
    assert first.prompt[:6] == second.prompt[:6]
    assert first.prompt[6:] != second.prompt[6:]
    assert len(first.prompt) == 16
    assert shape.longest == 21


def test_the_seed_decides() -> None:
    shape = RandomShape(10, 5)
    one, again, other = (random_items(shape, 4, 100, (), seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("wrong", [{"range_ratio": 1.0}, {"range_ratio": -0.1}, {"prefix_len": -1}])
def test_impossible_shapes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidOption):
        RandomShape(10, 5, **wrong)  # type: ignore[arg-type]


def test_custom_items_are_read_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "hello"}\n\n{"prompt": [1, 2], "max_tokens": 3}\n')
    assert custom_items(path, 3, output_len=9) == [Item("hello", 9), Item((1, 2), 3), Item("hello", 9)]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2 is not a JSON object"), ("[]", "line 2 is not"), ('{"prompt": 3}', "a text or a list"),
     ('{"prompt": []}', "a text or a list"), ('{"prompt": "x", "max_tokens": 0}', "at least 1")],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidOption, match=words):
        custom_items(path, 3, output_len=9)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(InvalidOption, match=name):
            custom_items(tmp_path / name, 3, output_len=9)
