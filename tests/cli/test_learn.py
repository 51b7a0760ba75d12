"""``mini-vllm learn``: from options to report, the report from its file, and bad input."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minivllm.cli.main import main
from minivllm.learn.result import Ladder, read

TINY = ("--num-requests", "4", "--prefix-len", "20", "--input-len", "6", "--output-len", "5", "--batch-size", "2",
        "--chunk-tokens", "8", "--num-threads", "1")  # fmt: skip
BLOCK = 16


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all rungs with the bundled model."""
    folder = tmp_path_factory.mktemp("ladder")
    assert main(["learn", *TINY, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def ladder(report: Path) -> Ladder:
    return read(report / "ladder.json")


def test_every_rung_ran_and_agreed(ladder: Ladder) -> None:
    assert [r.name for r in ladder.rungs] == ["0", "1", "2", "3", "4", "4k", "5", "6", "7", "8"]
    assert {r.name for r in ladder.rungs if not r.ran} - {"4k"} == {"7"}  # no GPU; and maybe no compiler
    assert all(r.left_out for r in ladder.rungs if not r.ran)
    for rung in ladder.ran[1:]:
        assert rung.agreement.compared == 4
        assert rung.agreement.equal + rung.agreement.near_ties == 4


def test_the_counts_are_those_of_the_workload(ladder: Ladder) -> None:
    requests = ladder.workload.requests(4096, {0})
    prompts, outputs = [len(r.prompt) for r in requests], [r.num_output for r in requests]
    needed = sum(p + n - 1 for p, n in zip(prompts, outputs, strict=True))
    by_name = {r.name: r for r in ladder.ran}
    for rung in ladder.ran:
        assert (rung.requests, rung.output_tokens, rung.needed) == (4, sum(outputs), needed)
        assert rung.cost.tokens == needed + rung.recomputed + rung.cost.padding - rung.found
        assert rung.predicted_s > 0
        assert rung.memory_s <= rung.predicted_s
        assert 0 < rung.ttft_s.p50 <= rung.ttft_s.p99
    every_prefix = sum(p + i for p, n in zip(prompts, outputs, strict=True) for i in range(n))
    assert by_name["0"].cost.tokens == every_prefix
    assert by_name["0"].recomputed == every_prefix - needed
    assert by_name["0"].cost.kv_bytes == 0
    # Rung 1: a prompt's K and V are written and read; then each token copies the old ones (read, written), is written, and all
    # are read.
    per_token = 8 * 2 * 2 * 64 * 4
    moved = sum(2 * p + sum(3 * (p + i) + 2 for i in range(n - 1)) for p, n in zip(prompts, outputs, strict=True))
    assert by_name["1"].cost.kv_bytes == moved * per_token
    assert by_name["1"].cost.calls == sum(outputs)
    padding = 0
    for two in (0, 2):  # rung 2 serves two at a time: prompts to the longer one, outputs until the longer one ends
        (p, q), (n, m) = prompts[two : two + 2], outputs[two : two + 2]
        padding += abs(p - q) + abs(n - m)
    assert by_name["2"].cost.padding == padding
    assert by_name["3"].cost.padding == by_name["4"].cost.padding == 0
    assert by_name["3"].cost.kv_padding_bytes > 0 == by_name["4"].cost.kv_padding_bytes
    assert by_name["4"].found == 0
    assert by_name["5"].found == by_name["6"].found == (4 - ladder.workload.num_prefixes) * BLOCK


class Page(HTMLParser):
    """Collects what a page would load, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.drawings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.loaded += [tag] if tag in ("link", "script", "iframe", "img") else []
        self.drawings += tag == "svg"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(report: Path) -> None:
    text = (report / "ladder.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert (page.loaded, page.open, page.drawings) == ([], [], 5)
    assert "url(" not in text and "@import" not in text
    assert len(text) < 100_000
    assert not re.search(r"\b(nan|inf)\b", text)


def test_the_picture_is_a_small_png(report: Path) -> None:
    content = (report / "ladder.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000


def test_a_report_can_be_made_from_its_file(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (report / "ladder.html").read_text(encoding="utf-8")
    assert main(["learn", "--from", str(report / "ladder.json"), "--output", str(tmp_path), "--markdown"]) == 0
    assert (tmp_path / "ladder.html").read_text(encoding="utf-8") == before
    assert not (tmp_path / "ladder.json").exists()
    told = capsys.readouterr().out
    assert "| 3 | continuous batch, padded |" in told
    assert "* **0 → 1, KV cache.**" in told
    assert "Rung 7 was left out" in told


def test_drawing_needs_no_torch(report: Path, tmp_path: Path) -> None:
    code = "import sys; from minivllm.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = ["learn", "--from", str(report / "ladder.json"), "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_page_is_written(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "minivllm.learn.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["learn", "--from", str(report / "ladder.json"), "--output", str(tmp_path)]) == 0
    assert "pip install 'mini-vllm[learn]'" in capsys.readouterr().err
    assert (tmp_path / "ladder.html").is_file()
    assert not (tmp_path / "ladder.png").exists()


def test_a_rung_whose_time_is_over_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["learn", *TINY, "--rungs", "0-4", "--max-rung-seconds", "1e-6", "--output", str(tmp_path)]
    assert main(argv) == 0
    found = read(tmp_path / "ladder.json").rungs
    assert [(r.requests, r.output_tokens) for r in found] == [(1, 1), (1, 1), (2, 2), (2, 2), (4, 4)]
    assert found[2].cut == found[3].cut > 0 < found[4].cut
    assert all(r.agreement.equal == r.agreement.compared for r in found)
    told = capsys.readouterr()
    assert "(1 of 4 requests, then its time was over)" in told.err
    assert "Rung 2 took no more requests after 1e-06 s: its figures are those of 2 of 4 (" in told.out
    assert "cut short after 2e-06 s" in told.out


def test_arrivals_are_waited_for(tmp_path: Path) -> None:
    argv = ["learn", *TINY, "--rungs", "3,6", "--request-rate", "20", "--rounds", "2", "--output", str(tmp_path)]
    assert main(argv) == 0
    found = read(tmp_path / "ladder.json")
    assert found.rounds == 2
    for rung in found.ran:
        assert (rung.requests, rung.cut) == (4, 0)
        assert rung.elapsed_s > 0
        assert 0 < rung.ttft_s.p50 <= rung.ttft_s.p99
    assert found.ran[1].agreement.compared == 4


def test_a_rung_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("minivllm.learn.rung2.serve", too_large)
    assert main(["learn", *TINY, "--rungs", "1-3", "--output", str(tmp_path)]) == 0
    found = read(tmp_path / "ladder.json")
    assert [(r.name, r.ran) for r in found.rungs] == [("1", True), ("2", False), ("3", True)]
    assert "lower --batch-size" in found.rungs[1].left_out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rungs", "9"], "'9' is not a rung or a range of them"),
        (["--rungs", "5-3"], "'5-3' is not a rung"),
        (["--prefix-len", "1000"], "do not fit the model's context of 1024"),
        (["--spread", "1"], "--spread must be at least 0 and under 1"),
        (["--request-rate", "-1"], "--request-rate must be 0"),
        (["--max-rung-seconds", "0"], "--max-rung-seconds must be a number over 0"),
        (["--max-rung-seconds", "nan"], "--max-rung-seconds must be a number over 0"),
        (["--batch-size", "0"], "whole number of at least 1"),
        (["--model", "./nowhere"], "There is no folder ./nowhere"),
        (["--device", "cuda"], "torch finds no CUDA device"),
        (["--from", "nowhere.json"], "nowhere.json cannot be read"),
        (["--quantization", "int8"], "There is no option --quantization"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", *argv, *([] if "--from" in argv else ["--output", str(tmp_path)])]) == 2
    told = capsys.readouterr().err.splitlines()
    assert words in told[-1]
    assert told[-1].startswith("mini-vllm: error: ")


@pytest.mark.parametrize("change", ["not json", "[]", {"version": 2}, {"rungs": []}, {"machine": 3}])
def test_a_broken_file_is_one_sentence(change: Any, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ladder.json"
    if isinstance(change, dict):
        whole = msgspec.json.decode((report / "ladder.json").read_bytes())
        path.write_bytes(msgspec.json.encode({**whole, **change}))
    else:
        path.write_text(change)
    assert main(["learn", "--from", str(path)]) == 2
    assert re.search(r"is no ladder.json of this version|holds no rung that ran", capsys.readouterr().err)


def test_a_folder_that_cannot_be_written(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["learn", "--from", str(report / "ladder.json"), "--output", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
