"""``AsyncLLM`` over an engine without a model: delivery, merging, refusal, abort, death."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
from fake_engine import fake_engine
from token_runner import expected_tokens

from minivllm.async_llm import AsyncLLM
from minivllm.config import make_config
from minivllm.engine.client import LocalClient
from minivllm.engine.engine import Engine
from minivllm.errors import ContextTooLong, EngineDead, InvalidRequest
from minivllm.observe.metrics import Metrics
from minivllm.records import EngineOutput
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.types import SamplingParams


class MortalClient(LocalClient):
    """A client whose engine can die."""

    dead = False

    async def outputs(self) -> EngineOutput:
        output = await super().outputs()
        if self.dead:
            raise EngineDead
        return output


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


@asynccontextmanager
async def serving(tokenizer: Tokenizer, engine: Engine, **options: object) -> AsyncIterator[tuple[AsyncLLM, MortalClient]]:
    client = MortalClient(engine)
    llm = AsyncLLM(client, tokenizer, make_config(**options), Metrics("test"))
    task = asyncio.create_task(llm.run())
    try:
        yield llm, client
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def collect(llm: AsyncLLM, name: str, prompt: Sequence[int], sampling: SamplingParams) -> tuple[list[int], str, str]:
    ids: list[int] = []
    text, reason = "", ""
    async for output in llm.generate(name, prompt, sampling):
        ids += output.token_ids
        text += output.text
        reason = output.finish_reason or reason
    return ids, text, reason


def greedy(max_tokens: int | None = 8, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, seed=0, **more)  # type: ignore[arg-type]


def test_every_caller_gets_its_own_tokens(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        engine = fake_engine(tokenizer.vocab_size, overlap=1)
        async with serving(tokenizer, engine) as (llm, _):
            prompts = [tuple(range(5, 6 + i)) for i in range(40)]
            results = await asyncio.gather(*(collect(llm, f"r{i}", p, greedy(3 + i)) for i, p in enumerate(prompts)))
            for i, (ids, text, reason) in enumerate(results):
                assert ids == expected_tokens(prompts[i], 3 + i, tokenizer.vocab_size, 0, frozenset())
                assert text == tokenizer.decode(ids)
                assert reason == "length"
            assert llm.num_open == 0
            assert llm.metrics.json()["total_tokens_generated"] == sum(3 + i for i in range(40))

    asyncio.run(scene())


def test_a_reader_that_lags_gets_everything_in_fewer_pieces(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, fake_engine(tokenizer.vocab_size)) as (llm, _):
            pieces = []
            async with aclosing(llm.generate("slow", (1, 2, 3), greedy(60))) as outputs:
                async for output in outputs:
                    pieces.append(output)
                    await asyncio.sleep(0.02)
            ids = [t for p in pieces for t in p.token_ids]
            assert ids == expected_tokens((1, 2, 3), 60, tokenizer.vocab_size, 0, frozenset())
            assert len(pieces) < 60
            assert pieces[-1].num_output == 60

    asyncio.run(scene())


def test_closing_the_generator_frees_the_blocks(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        engine = fake_engine(tokenizer.vocab_size)
        async with serving(tokenizer, engine) as (llm, _):
            async with aclosing(llm.generate("gone", (1, 2, 3), greedy(400))) as outputs:
                async for _ in outputs:
                    break
            for _ in range(200):
                if not engine.has_work:
                    break
                await asyncio.sleep(0.01)
            assert not engine.has_work
            assert llm.metrics.json()["active_requests"] == 0
            assert llm.metrics.json()["kv_cache_usage"] == 0

    asyncio.run(scene())


@pytest.mark.parametrize("overlap", [0, 1])
def test_blocks_of_a_client_that_went_away_are_free_within_two_steps(tokenizer: Tokenizer, overlap: int) -> None:
    async def scene() -> None:
        engine = fake_engine(tokenizer.vocab_size, overlap=overlap)
        async with serving(tokenizer, engine) as (llm, _):
            records = []
            observe = llm.metrics.observe
            llm.metrics.observe = lambda r: (records.append(r), observe(r))  # type: ignore[assignment,method-assign]
            stays = asyncio.create_task(collect(llm, "stays", (9, 8, 7), greedy(400)))
            leaves = llm.generate("leaves", (1, 2, 3), greedy(400))
            for _ in range(5):
                await anext(leaves)
            told_at = records[-1].step
            await leaves.aclose()
            await stays
        last = max(r.step for r in records if any(row.id == "leaves" for row in r.rows))
        assert last - told_at <= 2 + overlap  # steps planned before the engine could hear of it
        after = next(r for r in records if r.step == last + 1)
        assert after.num_running == 1

    asyncio.run(scene())


def test_a_stop_string_ends_the_request_in_the_engine(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        engine = fake_engine(tokenizer.vocab_size)
        async with serving(tokenizer, engine) as (llm, _):
            _, whole, _ = await collect(llm, "a", (1, 2, 3), greedy(200))
            stop = whole[40:44]
            async for output in llm.generate("b", (1, 2, 3), greedy(200, stop=(stop,))):
                last = output
            assert (last.finish_reason, last.stop_reason) == ("stop", stop)
            _, text, _ = await collect(llm, "c", (1, 2, 3), greedy(200, stop=(stop,)))
            assert text == whole[: whole.index(stop)]
            for _ in range(200):
                if not engine.has_work:
                    break
                await asyncio.sleep(0.01)
            assert not engine.has_work

    asyncio.run(scene())


def test_what_cannot_run_is_refused_before_the_engine_hears_of_it(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, fake_engine(tokenizer.vocab_size)) as (llm, _):
            for prompt, sampling, error in (
                ((), greedy(), InvalidRequest),
                ((1 << 20,), greedy(), InvalidRequest),
                (tuple(range(500)), greedy(100), ContextTooLong),
                ((1,) * 512, greedy(None), ContextTooLong),
                ((1,), SamplingParams(n=2, max_tokens=3), InvalidRequest),
            ):
                with pytest.raises(error):
                    await collect(llm, "x", prompt, sampling)
            assert len((await collect(llm, "fills", (1,) * 500, greedy(None)))[0]) == 12

    asyncio.run(scene())


def test_when_the_engine_dies_every_reader_hears_of_it(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        async with serving(tokenizer, fake_engine(tokenizer.vocab_size)) as (llm, client):
            tasks = [asyncio.create_task(collect(llm, f"r{i}", (1, 2), greedy(400))) for i in range(3)]
            await asyncio.sleep(0.05)
            client.dead = True
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(r, EngineDead) for r in results)
            assert not llm.alive
            with pytest.raises(EngineDead):
                await collect(llm, "late", (1,), greedy())

    asyncio.run(scene())
