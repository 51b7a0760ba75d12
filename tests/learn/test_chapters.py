"""The chapters' pictures are what the engine does: drawn again, they come out the same."""

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from minivllm.learn import chapters, scenes
from minivllm.learn.canvas import Canvas
from minivllm.learn.draw_blocks import frames, story
from minivllm.learn.draw_steps import Panel, lanes, lives, seats
from minivllm.records import StepRecord

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(repo: Path) -> Path:
    """Where the pictures are that the chapters show."""
    return repo / "docs" / "learn" / "pictures"


@pytest.mark.parametrize("name", sorted(chapters.PICTURES))
def test_a_picture_is_what_the_engine_does(name: str, drawn: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)  # recordings are looked for there
    svg = chapters.PICTURES[name]()
    if name in chapters.NOT_EXACT:
        svg, there = (re.sub(r"\d+(?:\.\d+)?", "0", text) for text in (svg, (drawn / f"{name}.svg").read_text("utf-8")))
        assert set(re.findall(r">([^<>]+)</text>", svg)) == set(re.findall(r">([^<>]+)</text>", there))
    else:
        there = (drawn / f"{name}.svg").read_text(encoding="utf-8")
        assert svg == there, "run python -m minivllm.learn.chapters docs/learn/pictures"


def test_no_picture_is_left_over(drawn: Path) -> None:
    assert {file.stem for file in drawn.iterdir()} == set(chapters.PICTURES)


@pytest.mark.parametrize("name", sorted(chapters.PICTURES))
def test_a_picture_is_whole_and_stays_on_its_card(name: str, drawn: Path) -> None:
    text = (drawn / f"{name}.svg").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text)
    width, height = (float(v) for v in tree.attrib["viewBox"].split()[2:])
    assert tree.find(f"{SVG}title") is not None and tree.find(f"{SVG}desc") is not None
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r'(?:href|src)=|url\((?!#)|@import', text) == []
    for rect in tree.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert min(x, y, w, h) >= 0 and x + w <= width and y + h <= height
    for words in tree.iter(f"{SVG}text"):
        x, y, long = float(words.attrib["x"]), float(words.attrib["y"]), 6.0 * len(words.text or "")
        before = {"end": long, "middle": long / 2}.get(words.attrib.get("text-anchor", ""), 0.0)
        assert x - before >= 0 and x - before + long <= width + 4 and y < height, words.text


def test_every_class_has_a_style(drawn: Path) -> None:
    for file in drawn.iterdir():
        text = file.read_text(encoding="utf-8")
        style = text[text.index("<style>") : text.index("</style>")]
        used = {name for names in re.findall(r'class="([^"]+)"', text) for name in names.split()}
        assert {name for name in used if f".{name}{{" not in style} == set()


@pytest.fixture(scope="module")
def paged() -> list[StepRecord]:
    return scenes.paged()


def test_lives_are_what_was_asked_for(paged: list[StepRecord]) -> None:
    found = {life.id: life for life in lives(paged)}
    assert list(found) == ["A", "B", "C", "D", "E"]
    assert [found[name].num_prompt for name in "ABCDE"] == [20, 37, 9, 50, 24]
    assert [len(found[name].rows) for name in "ABCDE"] == [30, 18, 42, 20, 22]  # one step a token of output
    assert found["E"].arrived == 22


def test_a_frame_holds_the_tokens_of_its_rows(paged: list[StepRecord]) -> None:
    steps = [record for record in paged if record.rows]
    for record, frame in zip(steps, frames(paged, scenes.BLOCK), strict=True):
        for row in record.rows:
            assert len(frame.tables[row.id]) == -(-(row.start + row.num_tokens) // scenes.BLOCK)
        held = [block for table in frame.tables.values() for block in table]
        assert len(set(held)) == len(held) and not frame.cached  # nothing is shared here, and nothing is kept


def test_records_that_do_not_add_up_are_not_drawn(paged: list[StepRecord]) -> None:
    broken = [*paged[:5], msgspec.structs.replace(paged[5], blocks_free=paged[5].blocks_free + 1), *paged[6:]]
    with pytest.raises(RuntimeError, match="do not add up"):
        story(broken, scenes.BLOCK, "broken")


def test_shared_blocks_are_shared() -> None:
    shown = list(frames(scenes.common_prefix(), scenes.BLOCK))
    assert any(len(frame.holders(block)) == 2 for frame in shown for block in range(1, 5))
    assert any(set(frame.cached) >= {1, 2, 3, 4} for frame in shown)


def test_a_static_batch_has_idle_places_and_a_continuous_one_hardly_any() -> None:
    def idle(records: list[StepRecord]) -> int:
        steps = sum(bool(record.rows) for record in records)
        return steps * 4 - sum(len(record.rows) for record in records)

    static, continuous = scenes.static_batch(), scenes.continuous_batch()
    assert sum(len(r.rows) for r in static) == sum(len(r.rows) for r in continuous) == sum(o for _, o in scenes.OF_A_BATCH)
    assert idle(static) > 3 * idle(continuous)
    assert len(seats(lives(continuous))) == 4
    assert lanes([Panel(static, "")], "x", by_seat=True).count('class="idle"') == idle(static) + 1  # and one in the key


def test_a_trace_shows_a_preemption_and_why_requests_wait() -> None:
    found = lives(scenes.busy())
    assert [life.id for life in found if life.preempted] == ["C"]
    assert {why for life in found for why in life.why.values()} >= {"rows", "blocks", "budget"}


def test_words_are_escaped_and_calls_repeat() -> None:
    def draw() -> str:
        canvas = Canvas(100, "a < b", "c & d")
        canvas.text(1, 2, "<script>")
        canvas.rect(0.04, 1, 2.25, 3, "f0")
        return canvas.svg(50)

    assert draw() == draw()
    assert "&lt;script&gt;" in draw() and "a &lt; b" in draw()
    ElementTree.fromstring(draw())
