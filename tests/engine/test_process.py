"""The seam between the processes: what the child's loop does with messages, and what the server reads of it."""

import asyncio

import pytest

from minivllm.config import make_config
from minivllm.engine.client import ProcessClient
from minivllm.engine.process import start_engine
from minivllm.errors import BrokenModelFolder, EngineDead, StartupError
from minivllm.types import GenerateRequest, SamplingParams

# A child that counts: request "n" with max_tokens m gets tokens 0 .. m - 1, one a step, and "big" is refused.
COUNTER = """
import sys
from minivllm.engine.process import serve_steps
from minivllm.errors import BrokenModelFolder, ContextTooLong
from minivllm.types import EngineInfo, EngineOutput, TokenEvent

class Counter:
    info = EngineInfo(64, 4, 64, 16, 9, 97, (), "cpu", "none", 0, 0, 0)
    def __init__(self):
        self.open, self.prepared = {}, 0
    @property
    def has_work(self):
        return bool(self.open)
    def add(self, request):
        if request.id == "big":
            raise ContextTooLong(100, 1, 64)
        self.open[request.id] = [0, request.sampling.max_tokens]
    def abort(self, ids):
        for name in ids:
            self.open.pop(name, None)
    def prepare_more(self):
        assert not self.open, "requests go first"
        self.prepared += 1
        assert self.prepared <= 3, "asked again after it had said no"
        return self.prepared < 3
    def step(self):
        events = []
        for name, counts in list(self.open.items()):
            counts[0] += 1
            done = counts[0] == counts[1]
            events.append(TokenEvent(name, (counts[0] - 1,), "length" if done else None))
            if done:
                del self.open[name]
        return EngineOutput(tuple(events))

def build(config):
    if config.server.port == 1:
        raise BrokenModelFolder("The folder is broken; mend it.")
    return Counter()

sys.exit(serve_steps(int(sys.argv[-1]), build))
"""


def request(name: str, max_tokens: int) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return GenerateRequest(id=name, prompt_ids=(1, 2), sampling=sampling, arrival_s=0.0)


async def collect(client: ProcessClient, names: set[str]) -> dict[str, list[int]]:
    """Tokens of the named requests until each has ended."""
    found: dict[str, list[int]] = {name: [] for name in names}
    while names:
        for event in (await client.outputs()).events:
            found.setdefault(event.id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                names = names - {event.id}
    return found


def test_requests_go_in_and_every_token_comes_out_in_order() -> None:
    async def scene() -> None:
        client = await start_engine(make_config(), ("-c", COUNTER))
        assert client.info.max_num_seqs == 4
        for i in range(20):
            client.add(request(f"r{i}", 3 + i * 7))
        await asyncio.sleep(0.2)  # many messages wait in the socket, cut anywhere
        assert await collect(client, {f"r{i}" for i in range(20)}) == {f"r{i}": list(range(3 + i * 7)) for i in range(20)}
        await client.close()

    asyncio.run(scene())


def test_refusals_and_aborts() -> None:
    async def scene() -> None:
        client = await start_engine(make_config(), ("-c", COUNTER))
        client.add(request("big", 1))
        (event,) = (await client.outputs()).events
        assert (event.id, event.finish_reason) == ("big", "error")
        assert event.error is not None
        client.add(request("endless", 10**9))
        await client.outputs()
        client.add(request("short", 2))
        client.abort(["endless", "unknown"])
        assert (await collect(client, {"short"}))["short"] == [0, 1]
        await client.close()
        with pytest.raises(EngineDead):
            while True:
                await client.outputs()

    asyncio.run(scene())


def test_a_child_that_cannot_start_says_why_or_is_missed() -> None:
    async def scene() -> None:
        with pytest.raises(BrokenModelFolder, match="mend it"):
            await start_engine(make_config(port=1), ("-c", COUNTER))
        with pytest.raises(StartupError, match="ended while it was starting"):
            await start_engine(make_config(), ("-c", "pass"))

    asyncio.run(scene())
