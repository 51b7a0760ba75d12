"""The engine in another process: requests go in, every token comes out once and in order, whatever the engine dies of."""

import asyncio
import os
import random
import resource
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from live_server import children
from mortal_engine import HANG, LATE_POISON, POISON, PROGRAM, VOCABULARY
from token_runner import expected_tokens

from minivllm.config import make_config
from minivllm.engine.supervisor import Patience, Supervisor, start_engine
from minivllm.errors import BrokenModelFolder, EngineDead, StartupError
from minivllm.types import GenerateRequest, SamplingParams, TokenEvent


def run(scene: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(50):
            await scene

    asyncio.run(limited())


def request(name: str, max_tokens: int = 30, prompt: tuple[int, ...] = (1, 2), **more: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=len(prompt), **more)
    return GenerateRequest(id=name, prompt_ids=prompt, sampling=sampling, arrival_s=0.0)


def expected(wanted: GenerateRequest) -> list[int]:
    sampling = wanted.sampling
    return expected_tokens(wanted.prompt_ids, sampling.max_tokens or 0, VOCABULARY, sampling.seed or 0, frozenset())


class Reader:
    """Collects what comes of requests, and does something to the engine when asked. Written by its test."""

    def __init__(self, client: Supervisor) -> None:
        self.client = client
        self.tokens: dict[str, list[int]] = {}
        self.told: dict[str, int] = {}  # logprobs of the prompt
        self.ends: dict[str, TokenEvent] = {}

    def add(self, *wanted: GenerateRequest) -> None:
        for one in wanted:
            self.tokens[one.id] = []
            self.told[one.id] = 0
            self.client.add(one)

    async def once(self) -> None:
        for event in (await self.client.outputs()).events:
            assert event.id not in self.ends, "something came after the end"
            self.tokens[event.id] += event.token_ids
            self.told[event.id] += len(event.prompt_logprobs)
            if event.finish_reason is not None:
                self.ends[event.id] = event

    @property
    def idle(self) -> bool:
        return self.ends.keys() >= self.tokens.keys()

    async def until_all_ended(self) -> None:
        while not self.idle:
            await self.once()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(engine_of(self.client), number)


def zygote_of(client: Supervisor) -> int:
    process = client._nest._process
    assert process is not None
    return process.pid


def engine_of(client: Supervisor) -> int:
    (engine,) = children(zygote_of(client))
    return engine


@asynccontextmanager
async def started(patience: Patience | None = None, **options: Any) -> AsyncIterator[Reader]:
    client = await start_engine(make_config(**options), PROGRAM, patience or Patience(max_restarts=100))
    try:
        yield Reader(client)
    finally:
        await client.close()


def test_requests_go_in_and_every_token_comes_out_in_order() -> None:
    async def scene() -> None:
        async with started() as reader:
            assert reader.client.info.max_num_seqs == 16
            assert reader.client.info.spare_bytes > 0
            wanted = [request(f"r{i}", 3 + i * 7, (1, 2, 20 + i)) for i in range(20)]
            reader.add(*wanted)
            await asyncio.sleep(0.2)  # many messages wait in the socket, cut anywhere
            await reader.until_all_ended()
            assert reader.tokens == {one.id: expected(one) for one in wanted}

    run(scene())


def test_refusals_and_aborts() -> None:
    async def scene() -> None:
        async with started() as reader:
            reader.add(request("big", 1, (1,) * 600))
            await reader.until_all_ended()
            assert reader.ends["big"].finish_reason == "error"
            assert reader.ends["big"].error is not None
            reader.add(request("endless", 400))
            while not reader.tokens["endless"]:
                await reader.once()
            reader.add(short := request("short", 2))
            reader.client.abort(["endless", "unknown"])
            while "short" not in reader.ends:
                await reader.once()
            assert reader.tokens["short"] == expected(short)
            assert "endless" not in reader.ends

    run(scene())


def test_an_engine_that_cannot_start_says_why_or_is_missed() -> None:
    async def scene() -> None:
        with pytest.raises(BrokenModelFolder, match="mend it"):
            await start_engine(make_config(port=1), PROGRAM)
        with pytest.raises(StartupError, match="ended while it was starting"):
            await start_engine(make_config(), ("-c", "pass"))

    run(scene())


def test_requests_outlive_their_engines() -> None:
    """Killed at any moment, over and over, while requests come, go and are aborted: every text is the one of no kill."""

    async def scene() -> None:
        draw = random.Random(3)
        async with started() as reader:
            wanted: list[GenerateRequest] = []
            aborted: set[str] = set()
            for turn in range(12):
                for i in range(6):
                    prompt = tuple(draw.randrange(20, 90) for _ in range(draw.choice([1, 5, 40, 200])))
                    asked = {"prompt_logprobs": 0} if draw.random() < 0.3 else {}
                    wanted.append(request(f"{turn}.{i}", draw.choice([1, 20, 60]), prompt, **asked))
                    reader.add(wanted[-1])
                aborted.add(f"{turn}.0")
                seen = sum(map(len, reader.tokens.values()))
                while sum(map(len, reader.tokens.values())) < seen + draw.randrange(100, 300) and not reader.idle:
                    await reader.once()
                if f"{turn}.0" not in reader.ends:
                    reader.client.abort([f"{turn}.0"])
                    del reader.tokens[f"{turn}.0"]
                reader.kill()
            await reader.until_all_ended()
            assert reader.client.health.num_restarts >= 8
            assert reader.client.health.up
            for one in wanted:
                if one.id in reader.tokens:
                    assert reader.ends[one.id].finish_reason == "length"
                    assert reader.tokens[one.id] == expected(one)
                    if one.sampling.prompt_logprobs is not None:
                        assert reader.told[one.id] == len(one.prompt_ids) - 1

    run(scene())


def test_a_paused_request_stays_paused_in_the_next_engine() -> None:
    async def scene() -> None:
        async with started() as reader:
            wanted = [request(f"r{i}", 60, (1, 2, 20 + i)) for i in range(3)]
            reader.add(*wanted)
            while min(map(len, reader.tokens.values())) < 5:
                await reader.once()
            reader.client.pause(["r1"])
            reader.kill()
            while not reader.ends.keys() >= {"r0", "r2"}:
                await reader.once()
            assert len(reader.tokens["r1"]) < 60
            reader.client.resume(["r1"])
            await reader.until_all_ended()
            assert reader.tokens == {one.id: expected(one) for one in wanted}

    run(scene())


def test_a_dead_zygote_is_replaced_too() -> None:
    async def scene() -> None:
        async with started() as reader:
            reader.add(wanted := request("r", 60))
            while not reader.tokens["r"]:
                await reader.once()
            engine = engine_of(reader.client)
            os.kill(zygote_of(reader.client), signal.SIGKILL)
            await reader.until_all_ended()
            assert reader.tokens["r"] == expected(wanted)
            stat = Path(f"/proc/{engine}/stat")  # whoever inherits the dead may not have looked yet
            assert not stat.exists() or " Z " in stat.read_text()

    run(scene())


@pytest.mark.parametrize("poison", [POISON, LATE_POISON])
def test_what_kills_engines_is_found_and_ended_alone(poison: int) -> None:
    async def scene() -> None:
        async with started() as reader:
            others = [request(f"r{i}", 40, (1, 2, 20 + i)) for i in range(7)]
            reader.add(*others[:4], bad := request("bad", 40, (1, poison, 3)), *others[4:])
            await reader.until_all_ended()
            assert reader.ends["bad"].finish_reason == "error"
            assert "ended three times" in (reader.ends["bad"].error or "")
            assert reader.tokens["bad"] == (expected(bad)[:5] if poison == LATE_POISON else [])
            assert {o.id: reader.tokens[o.id] for o in others} == {o.id: expected(o) for o in others}
            assert reader.client.health.num_restarts == 3

    run(scene())


@pytest.mark.parametrize("how", ["a step that never ends", "SIGSTOP", "SIGSTOP of both"])
def test_an_engine_that_hangs_is_replaced(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with started(Patience(silence_s=1.5, last_words_s=1.0), download_dir=str(tmp_path)) as reader:
            others = [request(f"r{i}", 60, (1, 2, 20 + i)) for i in range(3)]
            reader.add(*others)
            await reader.once()
            if how == "a step that never ends":
                reader.add(wanted := request("hang", 30, (1, HANG)))
                others.append(wanted)
            else:
                reader.kill(signal.SIGSTOP)
                if how == "SIGSTOP of both":
                    os.kill(zygote_of(reader.client), signal.SIGSTOP)
            await reader.until_all_ended()
            assert reader.tokens == {one.id: expected(one) for one in others}
            assert reader.client.health.num_restarts == 1

    run(scene())
    if how == "a step that never ends":  # a watchdog tells where
        assert "in deadly" in capfd.readouterr().err


def test_a_server_with_a_thousand_files_can_still_start_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400:
        pytest.skip("this process may not open enough files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    files = [os.dup(0) for _ in range(1100)]
    try:

        async def scene() -> None:
            async with started() as reader:
                reader.add(wanted := request("r"))
                await reader.once()
                os.kill(zygote_of(reader.client), signal.SIGKILL)
                await reader.until_all_ended()
                assert reader.tokens["r"] == expected(wanted)

        run(scene())
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_idle_engine_may_be_silent() -> None:
    async def scene() -> None:
        async with started(Patience(silence_s=0.5)) as reader:
            await asyncio.sleep(2)
            reader.add(wanted := request("r"))
            await reader.until_all_ended()
            assert reader.tokens["r"] == expected(wanted)
            assert reader.client.health.num_restarts == 0

    run(scene())


def test_enough_is_enough() -> None:
    async def scene() -> None:
        async with started(Patience(max_restarts=2)) as reader:
            reader.add(request("r", 450))
            with pytest.raises(EngineDead):
                for _ in range(3):
                    while len(reader.tokens["r"]) < 8:
                        await reader.once()
                    reader.kill()
                    reader.tokens["r"].clear()
                await reader.until_all_ended()
            assert not reader.client.health.up

    run(scene())


def test_nothing_is_left_behind() -> None:
    async def scene() -> None:
        async with started() as reader:
            both = [zygote_of(reader.client), engine_of(reader.client)]
            await reader.client.close()
            assert not [pid for pid in both if Path(f"/proc/{pid}").exists()]

    run(scene())


def test_the_zygote_starts_no_thread() -> None:
    """Seen in the real one: what it is forked from has torch, the kernels and the weights, and a single thread."""

    async def scene() -> None:
        client = await start_engine(make_config(num_threads=2))
        (zygote,) = [pid for pid in children(os.getpid()) if "zygote" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(list(Path(f"/proc/{zygote}/task").iterdir())) == 1
        assert "libtorch" in Path(f"/proc/{zygote}/maps").read_text()
        await client.close()

    assert sys.platform == "linux"
    run(scene())
