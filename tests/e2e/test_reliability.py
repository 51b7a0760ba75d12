"""The benchmarks of reliability in small, on the real server and the bundled model; how long things take is not judged here."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark by its name; ``benchmarks`` is no part of the package."""
    monkeypatch.syspath_prepend(str(repo))
    return lambda name: import_module(f"benchmarks.reliability.{name}")


def table(rows: list[tuple[str, object]]) -> dict[str, object]:
    return dict(rows)


def test_disconnects_give_their_blocks_back_within_two_steps(benchmark: Any) -> None:
    disconnects = benchmark("disconnects")
    rows, broken = disconnects.run(150, 12, 1)  # of 60, sometimes none leaves during its prefill
    assert broken == []
    assert int(str(table(rows)["sequences aborted"])) >= 150


def test_slow_readers_hold_no_blocks_and_get_their_whole_text(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_readers = benchmark("slow_readers")
    monkeypatch.setattr(slow_readers, "MOST_ITL", math.inf)
    monkeypatch.setattr(slow_readers, "MOST_BYTES", math.inf)  # of so few, what the allocator does would be measured
    rows, broken = slow_readers.measure(slow_readers.Sizes(stalled=5, readers=2, hold_s=1, rounds=1, tokens=40))
    assert broken == []
    assert table(rows)["whole texts when they were read"] == "5 of 5"


def test_overload_is_refused_and_nobody_fails(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    overload = benchmark("overload")
    monkeypatch.setattr(overload, "LEAST_GOODPUT", 0.0)
    monkeypatch.setattr(overload, "LEAST_TAKEN", 0.0)
    monkeypatch.setattr(overload, "MOST_REFUSAL_S", math.inf)
    monkeypatch.setattr(overload, "BURST", 70)
    rows, broken = overload.run(3.0, 4.0, 5.0)
    assert broken == []
    finished, refused = (int(n) for n in str(table(rows)["finished, refused"]).split(", "))
    assert finished > 0
    assert refused > 0


def test_many_streams_are_open_at_once(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = benchmark("streams")
    monkeypatch.setattr(streams, "MOST_GAP_S", math.inf)
    rows, broken = streams.run(150, 2.0, 0.5, 100.0)
    assert broken == []
    assert table(rows)["streams open at once, whole in the end"] == "150, 150"


def test_servers_stop_well_and_leave_nothing(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = benchmark("stops")
    monkeypatch.setattr(stops, "MOST_LEFT_S", 20.0)
    rows, broken = stops.run(1, 8)
    assert broken == []
    assert table(rows)["files and sockets left"] == 0


def test_after_mixed_traffic_with_aborts_nothing_is_held(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = benchmark("soak")
    monkeypatch.setattr(soak, "LEAST_SAMPLES", math.inf)  # what memory does takes an hour to say
    rows, broken = soak.run(soak.Sizes(0.2, 0.08, (4.0, 5.0), load=2.0, grammars=20))
    assert broken == []
    found = table(rows)
    moments, after = (int(n) for n in str(found["idle moments, of them after the warm-up"]).split(", "))
    assert after >= 1
    assert found["idle moments with the canary's bytes"] == moments
