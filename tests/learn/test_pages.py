"""The page about the ladder says what its figures say, and stays small."""

import sys
from pathlib import Path

import pytest

from minivllm.learn.result import read

MOST_BYTES = 300_000


@pytest.fixture
def folder(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(repo), *sys.path])
    return repo / "docs" / "learn"


def test_the_page_is_filled_from_its_files(folder: Path) -> None:
    from benchmarks.ladder import REGION, filled

    page = (folder / "ladder.md").read_text(encoding="utf-8")
    assert {m[2] for m in REGION.finditer(page)} == {p.stem.removeprefix("ladder-") for p in folder.glob("ladder-*.json")}
    assert filled(page, folder) == page, "python -m benchmarks.ladder brings docs/learn/ladder.md up to its figures"


def test_every_ladder_agrees_with_itself(folder: Path) -> None:
    found = {path.name: read(path) for path in folder.glob("ladder-*.json")}
    assert found
    for ladder in found.values():
        assert all(rung.agreement.different == 0 for rung in ladder.ran)
        assert sum(rung.agreement.equal for rung in ladder.ran) > 0


def test_the_ladders_files_are_small(folder: Path) -> None:
    files = list(folder.glob("ladder*"))
    assert {p.suffix for p in files} == {".md", ".json", ".png"}
    assert sum(p.stat().st_size for p in files) < MOST_BYTES
