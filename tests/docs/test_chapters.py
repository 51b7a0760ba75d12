"""The chapters say what is so: their links, commands and options exist, and their numbers are the engine's."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from minivllm.cli.main import COMMANDS
from minivllm.cli.options import markdown
from minivllm.learn import chapters, rungs, scenes
from minivllm.learn.draw_blocks import frames
from minivllm.learn.draw_steps import Life, lives, seats
from minivllm.records import StepRecord

NUM_CHAPTERS = 14


@pytest.fixture(scope="module")
def pages(repo: Path) -> dict[str, str]:
    """Of docs/learn, by name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted((repo / "docs" / "learn").glob("*.md"))}


@pytest.fixture(scope="module")
def told(pages: dict[str, str]) -> dict[int, str]:
    """The chapters by number, as one line each."""
    return {int(name[:2]): " ".join(text.split()) for name, text in pages.items() if name[:2].isdigit()}


def test_a_chapter_has_all_its_parts(told: dict[int, str]) -> None:
    assert sorted(told) == list(range(NUM_CHAPTERS))
    for number, text in told.items():
        assert text.startswith(f"# {number}. ")
        for part in ("![", "## The code", "## Exercise", "## Papers", f"exercises/test_{number:02}_"):
            assert part in text, f"chapter {number} has no {part}"


def test_names_are_defined_where_links_lead(repo: Path, sources: ModuleType) -> None:
    """A link whose text is a name leads to the file that defines it."""
    missing, count = [], 0
    for page in (repo / "docs").rglob("*.md"):
        links = sources.Links(page.relative_to(repo).as_posix(), lambda path: (repo / path).exists())
        for match in sources.LINK.finditer(sources.FENCE.sub("", page.read_text(encoding="utf-8"))):
            path, name = links.target(match["to"]), match["text"]
            if path is None or not path.endswith(".py") or not re.fullmatch(r"`[\w.]+`", name) or name.endswith(".py`"):
                continue
            count += 1
            if sources.find_line((repo / path).read_text(encoding="utf-8"), name.strip("`")) is None:
                missing.append(f"{page.name}: {name} in {path}")
    assert missing == []
    assert count > 60


def test_relative_links_lead_somewhere(repo: Path, sources: ModuleType) -> None:
    dead = []
    for page in [*(repo / "docs").rglob("*.md"), repo / "README.md", *(repo / "deploy").rglob("*.md")]:
        links = sources.Links(page.relative_to(repo).as_posix(), lambda path: (repo / path).exists())
        found = re.findall(r"\]\(([^)\s]+)\)", sources.FENCE.sub("", page.read_text(encoding="utf-8")))
        inside = [to for to in found if "://" not in to and not to.startswith("#")]
        dead += [f"{page.name}: {to}" for to in inside if links.target(to) is None]
    assert dead == []


def test_every_picture_is_shown(pages: dict[str, str]) -> None:
    shown = {name for text in pages.values() for name in re.findall(r"\(pictures/(\w+)\.svg\)", text)}
    assert shown == set(chapters.PICTURES)


def test_commands_exist(pages: dict[str, str]) -> None:
    text = "\n".join(pages.values())
    assert set(re.findall(r"\bmini-vllm ([a-z]+)", text)) <= set(COMMANDS)
    for given in re.findall(r"--rungs ([\w,-]+)", text):
        assert rungs.chosen(given)


def test_options_exist(told: dict[int, str]) -> None:
    known = set(re.findall(r"`(--[\w-]+)`", markdown()))
    used = {option for text in told.values() for option in re.findall(r"`(--[a-z][\w-]+)", text)}
    other = {"--solution", "--rungs", "--explain"}
    assert {option for option in used if option.replace("--no-", "--") not in known | other} == set()


def test_papers_are_named_whole(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        for shown, number in re.findall(r"\[arXiv:([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", text):
            assert shown == number and re.fullmatch(r"\d{4}\.\d{4,5}", number), f"{name}: {shown}"
        assert len(re.findall(r"arXiv:", text)) == len(re.findall(r"\[arXiv:", text)), f"{name} names a paper without its link"


# ---------------------------------------------------------------------------------------------------------------- numbers


def tokens(records: list[StepRecord]) -> int:
    return sum(row.num_tokens for record in records for row in record.rows)


def steps(records: list[StepRecord]) -> list[StepRecord]:
    return [record for record in records if record.rows]


@cache
def run_of(scene: Callable[..., list[StepRecord]], *arguments: object) -> tuple[list[StepRecord], dict[str, Life]]:
    """A scene's records, and the lives in it by name."""
    records = scene(*arguments)
    return records, {life.id: life for life in lives(records)}


def test_numbers_of_no_cache(told: dict[int, str]) -> None:
    assert f"{tokens(scenes.without_cache(6, 10))} in all, for 10 tokens" in told[0]
    assert f"{tokens(scenes.with_cache(6, 10))} tokens are computed where 105 were" in told[1]
    assert f"{500 * 500 + 500 * 499 // 2:,} tokens" in told[0]


def test_numbers_of_batches(told: dict[int, str]) -> None:
    static, by_name = run_of(scenes.static_batch)
    given = sum(len(record.rows) for record in static)
    assert f"Of the {4 * len(steps(static))} places in {len(steps(static))} steps, {given} gave a token" in told[2]
    assert f"{100 * (1 - given / (4 * len(steps(static)))):.0f} % were idle" in told[2]
    first, later = by_name["D"], by_name["E"]
    assert f"Row 3 (D) wants {len(first.rows)} tokens and keeps its place for {min(later.rows)} steps" in told[2]
    assert seats(list(by_name.values()))[3][0].id == "D"
    continuous, by_name = run_of(scenes.continuous_batch)
    count = len(steps(continuous))
    assert f"need {count} steps where the static batch took {len(steps(static))}" in told[3]
    assert f"E begins at step {min(by_name['E'].rows)}, when D ends, and not at {min(later.rows)}" in told[3]
    assert f"{4 * count - given} places are idle" in told[3]


def test_numbers_of_padding_and_paging(told: dict[int, str]) -> None:
    records, by_name = run_of(scenes.paged)
    known = [row.start + row.num_tokens for row in steps(records)[12].rows]
    room = max(known) * len(known)
    assert f"{100 * (room - sum(known)) / room:.0f} % of it is padding, for texts of {min(known)} to {max(known)}" in told[3]
    held = sum(-(-n // scenes.BLOCK) for n in known) * scenes.BLOCK
    assert f"{held - sum(known)} slots of {held}" in told[4]
    shown = list(frames(records, scenes.BLOCK))
    end = by_name["D"].ended
    assert end is not None and shown[end].holders(7) == ("D",) and shown[end + 1].holders(7) == ("C",)
    assert shown[by_name["A"].ended or 0].tables["A"][-1] == 8


def test_numbers_of_the_prefix_cache(told: dict[int, str]) -> None:
    _, by_name = run_of(scenes.common_prefix)
    for name, words in (("B", "B's prompt has {} tokens and it computes {}"), ("D", "D's has {} and it computes {}")):
        first = by_name[name].rows[min(by_name[name].rows)]
        assert first.cached == 64
        assert words.format(by_name[name].num_prompt, first.num_tokens) in told[5]


def test_numbers_of_the_ladder(told: dict[int, str], repo: Path) -> None:
    """Counts alone: how fast it was is the ladder's own page to say."""
    measured = json.loads((repo / "docs" / "learn" / "ladder-bundled.json").read_text(encoding="utf-8"))["rungs"]
    cost = {rung["name"]: rung["cost"] for rung in measured}
    moved = [f"{cost[rung]['kv_bytes'] / 1e9:.3g} GB" for rung in ("3", "4")]
    assert f"rung 3 move {moved[0]} through memory, the blocks of rung 4 {moved[1]}," in told[4]
    found = next(rung["found"] for rung in measured if rung["name"] == "5")
    assert f"{cost['4k']['tokens']:,} tokens {found:,} are found, and {cost['5']['tokens']:,} are left" in told[5]
    assert cost["4k"]["tokens"] - found == cost["5"]["tokens"]
    waited = {rung["name"]: rung["ttft_s"]["p50"] for rung in measured}
    assert f"after {waited['3']:.1f} s instead of {waited['2']:.1f}" in told[3]


def test_numbers_of_chunks(told: dict[int, str]) -> None:
    whole, _ = run_of(scenes.long_prompt, 256)
    chunked, by_name = run_of(scenes.long_prompt, 32)
    assert f"step 4 computes {sum(row.num_tokens for row in steps(whole)[4].rows)} tokens" in told[6]
    assert max(sum(row.num_tokens for row in record.rows) for record in chunked) == 32
    chunks = [row for row in by_name["D"].rows.values() if row.kind == "prefill"]
    assert len(chunks) == 7 and max(row.num_tokens for row in chunks) == 29
    assert "seven steps of 29 tokens and less" in told[6] and "first token at step 10 instead of 4" in told[6]
    assert max(step for step, row in by_name["D"].rows.items() if row.kind == "prefill") == 10


def test_numbers_of_the_gpu(told: dict[int, str], repo: Path) -> None:
    cases = json.loads((repo / "docs" / "learn" / "recordings" / "h100_steps.json").read_text(encoding="utf-8"))["cases"]
    ms = {(case["rows"], case["graphs"], case["overlap"]): case["step_ms"] for case in cases}
    for rows, words in ((1, "1 row"), (32, "32 rows")):
        assert f"| {words} | {ms[rows, False, False]:.1f} | {ms[rows, True, False]:.2f} |" in told[7]
        assert f"| {words} | {ms[rows, True, False]:.2f} | {ms[rows, True, True]:.2f} |" in told[8]


def test_numbers_of_policies(told: dict[int, str]) -> None:
    began = {policy: min(run_of(scenes.queue_order, policy)[1]["E"].rows) for policy in ("fcfs", "priority")}
    assert f"begins at step {began['fcfs']}; by priority" in told[9] and f"at step {began['priority']}." in told[9]
    _, by_name = run_of(scenes.long_prompt, 64, "mixed")
    assert max(step for step, row in by_name["D"].rows.items() if row.kind == "prefill") == 6
    _, by_name = run_of(scenes.long_prompt, 64, "prefill-first")
    assert [b - a for a, b in by_name["A"].gaps] == [2]


def test_numbers_of_memory(told: dict[int, str]) -> None:
    records, by_name = run_of(scenes.memory_use)
    assert f"a cache of {records[-1].blocks_total} blocks" in told[11]
    first = by_name["F"].rows[min(by_name["F"].rows)]
    assert first.cached == 32 and first.blocks == by_name["A"].rows[0].blocks
    gained = {block for step, row in by_name["E"].rows.items() if step == 31 for block in row.blocks[0]}
    shown = list(frames(records, scenes.BLOCK))
    assert {shown[30].cached[block] for block in gained} == {"B"} and "At step 31" in told[11]
    assert gained == {shown[2].tables["B"][1]}


def test_numbers_of_preemption(told: dict[int, str]) -> None:
    records, by_name = run_of(scenes.too_little_memory)
    life = by_name["C"]
    (given,) = [preemption for record in records for preemption in record.preempted]
    assert life.preempted == [23] and f"At step 23 {given.by} needs a block" in told[12]
    back = min(step for step in life.rows if step > 23)
    assert f"at step {back} it computes {life.rows[back].num_tokens} tokens at once" in told[12]
    assert f"its {sum(step < 23 for step in life.rows)} tokens of text stay" in told[12]
    assert records[-1].blocks_total == 9


def test_numbers_of_the_trace(told: dict[int, str]) -> None:
    _, by_name = run_of(scenes.busy)
    first = by_name["C"].rows[min(by_name["C"].rows)]
    assert f"Of its {by_name['C'].num_prompt} tokens {first.cached} are" in told[13]
    assert f"{first.num_tokens} are computed" in told[13]
    (gone,) = by_name["C"].preempted
    back = by_name["C"].rows[min(step for step in by_name["C"].rows if step > gone)]
    assert f"At step {gone} the cache is full" in told[13]
    assert f"comes back with {back.num_tokens} tokens: the rest of its {back.cached + back.num_tokens}" in told[13]
    assert by_name["A"].ended == min(step for step in by_name["C"].rows if step > gone) - 1
    assert [row.num_tokens for row in by_name["B"].rows.values() if row.kind == "prefill"] == [19, 11]
    assert set(by_name["D"].why.values()) == {"rows", "blocks"}
    assert set(by_name["E"].why.values()) == {"rows", "blocks", "budget"}
