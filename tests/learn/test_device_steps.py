"""The command that records a GPU's steps, in small and on the CPU: chapters 7 and 8 can be drawn from what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from minivllm.learn.draw_charts import clock
from minivllm.learn.draw_steps import Panel
from minivllm.records import StepRecord


def test_what_it_keeps_can_be_drawn(repo: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    command = [sys.executable, "-m", "benchmarks.observe.device_steps", "--model", "tiny", "--models-folder", str(tmp_path)]
    asked = ["--rows", "2", "--steps", "6", "--keep", "10", "--option", "device=cpu", "--out", str(out)]
    done = subprocess.run([*command, *asked], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: graphs were slower, which says nothing where there are none
    assert done.stdout.splitlines()[0].split()[:4] == ["rows", "kernel", "by", "kernel"]
    told = json.loads(out.read_text(encoding="utf-8"))
    assert [(case["graphs"], case["overlap"]) for case in told["cases"]] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    for case in told["cases"]:
        records = msgspec.convert(case["records"], tuple[StepRecord, ...])
        assert len(records) == 5 and case["step_ms"] > 0
        assert all(len(record.rows) == 2 and record.rows[0].kind == "decode" for record in records)
        assert all(r.scheduled_s <= r.launched_s <= r.finished_s for r in records)
        evenly = tuple([  # a machine that is busy with others takes long for a step, and the picture has five milliseconds
            msgspec.structs.replace(r, scheduled_s=i / 1e3, launched_s=(i + 0.2) / 1e3, finished_s=(i + 0.9) / 1e3)
            for i, r in enumerate(records)
        ])  # fmt: skip
        assert clock([Panel(evenly, "a case")], "steps", 5.0).count("<rect") >= 2 * len(evenly)
