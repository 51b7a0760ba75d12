"""Following several generators at once: order, errors, and that none is left open."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from minivllm.errors import ContextTooLong, GenerationFailed
from minivllm.server.serving import follow
from minivllm.types import FinishReason, RequestOutput


class Source:
    """Generators that note whether they were closed."""

    def __init__(self) -> None:
        self.open = 0

    async def outputs(
        self, texts: Sequence[str], reason: FinishReason | None = "stop", error: Exception | None = None
    ) -> AsyncGenerator[RequestOutput]:
        self.open += 1
        try:
            for i, text in enumerate(texts):
                await asyncio.sleep(0)
                last = i == len(texts) - 1
                yield RequestOutput(id="a", text=text, token_ids=(1,), finish_reason=reason if last else None)
            if error is not None:
                raise error
            if reason is None and not texts:
                await asyncio.sleep(3600)
        finally:
            self.open -= 1


def taken(streams: Sequence[Any], limit: int = 1000) -> list[tuple[int, str]]:
    """What ``follow`` gives, up to a number of outputs."""

    async def take() -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        async with aclosing(follow(streams)) as outputs:
            async for index, output in outputs:
                found.append((index, output.text))
                if len(found) == limit:
                    break
        return found

    return asyncio.run(take())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_output_comes_in_its_generators_order(count: int) -> None:
    source = Source()
    found = taken([source.outputs([f"{i}{c}" for c in "abcd"[: i + 1]]) for i in range(count)])
    for i in range(count):
        assert [text for index, text in found if index == i] == [f"{i}{c}" for c in "abcd"[: i + 1]]
    assert source.open == 0


@pytest.mark.parametrize("count", [1, 3])
def test_leaving_early_closes_all(count: int) -> None:
    source = Source()
    waiting = [source.outputs([], None) for _ in range(count - 1)]
    assert len(taken([source.outputs(["a", "b"]), *waiting], limit=1)) == 1
    assert source.open == 0


@pytest.mark.parametrize("others", [0, 2])
def test_an_error_comes_through_and_closes_the_others(others: int) -> None:
    source = Source()
    waiting = [source.outputs([], None) for _ in range(others)]
    with pytest.raises(ContextTooLong):
        taken([source.outputs([], error=ContextTooLong(1, 2, 3)), *waiting])
    assert source.open == 0


@pytest.mark.parametrize("reason", [None, "error"])
def test_an_end_without_a_reason_is_a_failure(reason: FinishReason | None) -> None:
    with pytest.raises(GenerationFailed):
        taken([Source().outputs(["a", "b"], reason)])
