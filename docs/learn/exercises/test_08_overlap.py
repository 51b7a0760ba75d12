"""Exercise 8: two that take turns, or work at once.

Write ``ends(plan_ms, device_ms, num_steps, ahead)``: when each step's tokens have been read, counted from the start. The
host needs ``plan_ms`` to plan and launch a step, the device ``device_ms`` to compute it, steps in their order; reading
takes no time. Not ``ahead``: a step is planned when the one before was read. ``ahead``: a step is planned as soon as the
one before was launched, and the one before that was read. Your prediction is compared with an H100.
"""

import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

RECORDING = Path(__file__).parent.parent / "recordings" / "h100_steps.json"


@pytest.mark.parametrize(
    ("plan_ms", "device_ms", "ahead", "expected"),
    [
        (1, 3, False, [4, 8, 12, 16]),
        (1, 3, True, [4, 7, 10, 13]),  # the device is never idle
        (3, 1, False, [4, 8, 12, 16]),
        (3, 1, True, [4, 7, 10, 13]),  # the host is never idle
        (2, 2, True, [4, 6, 8, 10]),
    ],
)
def test_by_hand(solution: ModuleType, plan_ms: float, device_ms: float, ahead: bool, expected: list[float]) -> None:
    assert list(solution.ends(plan_ms, device_ms, len(expected), ahead)) == pytest.approx(expected)


def case(rows: int, ahead: bool) -> dict[str, Any]:
    cases = json.loads(RECORDING.read_text(encoding="utf-8"))["cases"]
    return next(dict(c) for c in cases if c["rows"] == rows and c["graphs"] and c["overlap"] is ahead)


@pytest.mark.parametrize("rows", [1, 32])
def test_an_h100_does_so_too(solution: ModuleType, rows: int) -> None:
    """From times of an engine that is not ahead, the step time of one that is."""
    records = case(rows, ahead=False)["records"]
    device_ms = 1e3 * median(r["finished_s"] - r["launched_s"] for r in records)
    plan_ms = case(rows, ahead=False)["step_ms"] - device_ms
    told = list(solution.ends(plan_ms, device_ms, 12, True))
    assert (told[-1] - told[1]) / 10 == pytest.approx(case(rows, ahead=True)["step_ms"], rel=0.1)
