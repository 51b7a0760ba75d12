"""``mini-vllm explain`` and ``mini-vllm trace`` on a recording of the real scheduler."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chrome_trace import Trace
from scheduler_bench import Bench

from minivllm.cli.main import main
from minivllm.observe.explain import Explanations
from minivllm.observe.explanation import Explanation
from minivllm.observe.recording import Recorder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bench]:
    """Four requests for two rows and few blocks; the last one still runs when the recording ends."""
    bench = Bench(num_blocks=13, max_model_len=40, scheduling_policy="priority", max_num_seqs=2)
    bench.add("low", tuple(range(8)), 25, priority=5)
    bench.step()
    bench.add("high", tuple(range(16, 24)), 30, priority=0)
    bench.add("twin", (1, 2, 3, 4, 5), 3, priority=3)
    bench.add("twin-1", (1, 2, 3, 4, 5), 5, priority=3, fork_of="twin", sampling={"seed": 1})
    bench.run()
    bench.add("runs", (9, 9), 20)
    bench.step()
    bench.step()
    path = tmp_path_factory.mktemp("recording") / "steps.bin"
    recorder = Recorder(path)
    recorder.begin(bench.engine.info, "tiny")
    for record in bench.records:
        recorder.add(record)
    recorder.close()
    return path, bench


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_without_an_id_each_request_has_a_line_the_slowest_first(
    recording: tuple[Path, Bench], capsys: pytest.CaptureFixture[str]
) -> None:
    head, *lines = said(capsys, "explain", recording[0]).splitlines()
    assert head.split()[:6] == ["request", "total", "queue", "prefill", "decode", "preempted"]
    assert {line.split()[0] for line in lines} == {"low", "high", "twin", "runs"}
    totals = [float(line.split()[1].removesuffix("s")) for line in lines]
    assert totals == sorted(totals, reverse=True) and totals[0] > 50
    (low,) = [line for line in lines if line.startswith("low")]
    assert "behind high" in low or "decode" in low


def test_with_an_id_everything_is_said(recording: tuple[Path, Bench], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", recording[0], "low")
    assert "ended: length" in text and "8 prompt tokens, 25 tokens generated" in text
    for phrase in ("queue", "prefill", "decode", "preempted", "unexplained", "█", "by high (blocks)", "back after", "waited"):
        assert phrase in text
    assert "it runs still" in said(capsys, "explain", recording[0], "run")  # the beginning of an id is enough
    both = said(capsys, "explain", recording[0], "twin")
    assert "text twin:" in both and "text twin-1:" in both
    assert said(capsys, "explain", recording[0], "twin-1").startswith("twin-1  ")


def test_as_json_it_is_what_the_server_would_say(
    recording: tuple[Path, Bench], capsys: pytest.CaptureFixture[str]
) -> None:
    path, bench = recording
    book = Explanations("tiny")
    for record in bench.records:
        book.observe(record)
    lines = said(capsys, "explain", path, "--json").splitlines()
    told = [msgspec.json.decode(line, type=Explanation) for line in lines]
    assert told == [book.explain(name, bench.records[-1].collected_s) for name in ("low", "high", "twin", "runs")]


def test_what_is_not_there_is_said_in_a_sentence(
    recording: tuple[Path, Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"no recording at all")
    for argv in (["explain", recording[0], "nobody"], ["explain", tmp_path / "none"], ["explain", noise], ["trace", noise],
                 ["trace", recording[0], "-o", tmp_path / "no" / "folder.json"], ["explain"]):  # fmt: skip
        assert main([str(word) for word in argv]) != 0
        error = capsys.readouterr().err
        assert error.startswith("mini-vllm: error: ") and error.count("\n") == 1
    assert main(["explain", str(recording[0]), "nobody"]) == 2
    assert "no request 'nobody'" in capsys.readouterr().err


def test_a_trace_is_written_to_a_file_or_to_stdout(
    recording: tuple[Path, Bench], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path, bench = recording
    out = tmp_path / "trace.json"
    assert main(["trace", str(path), "-o", str(out)]) == 0
    document: dict[str, Any] = json.loads(out.read_bytes())
    assert document["otherData"]["model"] == "tiny"
    trace = Trace(document)
    assert str(len(trace.events)).encode() in capfdbinary.readouterr().out
    assert {name for (pid, _), name in trace.names.items() if pid == 2} == bench.requests.keys()
    assert main(["trace", str(path), "-o", "-"]) == 0
    assert json.loads(capfdbinary.readouterr().out) == document
