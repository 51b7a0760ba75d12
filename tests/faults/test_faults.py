"""A fault that belongs to one request is that request's alone, wherever it happens."""

import asyncio
from pathlib import Path

import pytest
from faults import POINTS, Faults, Tally, inject, quiet, staged, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("overlap", [False, True])
def test_only_the_request_that_is_hit_may_notice(model: Path, overlap: bool) -> None:
    """What ``python -m benchmarks.reliability.faults`` does twenty thousand times."""
    count = 143

    async def scene() -> Tally:
        async with staged(model, async_scheduling=overlap) as stage:
            with Faults() as faults, quiet():
                return await inject(stage, faults, count, int(overlap), 2, lambda tally: None)

    tally = asyncio.run(scene())
    assert tally.broken == []
    assert tally.faults == dict.fromkeys({point.place for point in POINTS}, count // 13)
    assert tally.ended > count // 2
