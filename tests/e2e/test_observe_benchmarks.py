"""The benchmarks of what observing costs, in small; how long things take is not judged here."""

import math
from importlib import import_module
from pathlib import Path

import pytest


def test_recording_is_compared_with_none(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo))
    overhead = import_module("benchmarks.observe.overhead")
    monkeypatch.setattr(overhead, "MOST_LOSS", math.inf)
    monkeypatch.setattr(overhead, "STEP_US", math.inf)
    rows, broken = overhead.run(8, 6, 2, ["tiny"])
    assert broken == []
    found = dict(rows)
    assert float(str(found["tiny: bytes of the file a step"]).replace(",", "")) > 10
    assert str(found["scheduler, 8 rows: us a step without, with, allowed"]).endswith(", inf")
