"""A server whose engine has a scheduler but no model, and makes so many steps a second, for as long as it runs.

    python -m benchmarks.observe.paced_server --steps-per-s 500 --rows 16

What watches an engine can be tried on it at speeds that the machine's model does not reach. Scheduler, block tables, prefix
cache, records and routes are the real ones; tokens come out of a hat. It sends itself requests: half of the prompts begin
alike, lengths differ, and the cache is too small for all, so that requests wait and are preempted.
"""

import argparse
import asyncio
import random
import sys
import time
import uuid
from dataclasses import dataclass, field

import msgspec
import uvloop

from minivllm.async_llm import AsyncLLM
from minivllm.cli.serve import raise_open_files_limit
from minivllm.config import BUNDLED_MODEL, make_config
from minivllm.engine.client import LocalClient
from minivllm.engine.engine import Engine
from minivllm.kv.allocator import Allocator
from minivllm.observe.metrics import metrics_for
from minivllm.records import EngineOutput
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.server.application import create_app
from minivllm.server.http import serve
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import (
    WANT_SAMPLE,
    EngineInfo,
    GenerateRequest,
    SamplingParams,
    StepPlan,
    StepResult,
    StepTimes,
)

BLOCK_SIZE, MAX_TOKENS, LONGEST = 16, 256, 512
SHARED = tuple(range(100, 196))  # how half of the prompts begin


@dataclass
class Done:
    """A step that took no time."""

    outcome: StepResult

    def sample(self, masks: None = None) -> None:
        """Nothing is left to do."""

    def result(self) -> StepResult:
        """At once."""
        return self.outcome


@dataclass
class Hat:
    """A runner that draws tokens. It waits until a step is due. Written by ``launch`` alone."""

    steps_per_s: float
    draw: random.Random
    due_s: float = 0.0

    def launch(self, plan: StepPlan) -> Done:
        """One step, not before its time; time that was lost is not made up for beyond a few steps."""
        now = time.monotonic()
        self.due_s = max(self.due_s + 1 / self.steps_per_s, now - 0.05)
        if self.due_s > now:
            time.sleep(self.due_s - now)
        tokens = tuple([(self.draw.randrange(3, 4000),) if work.wants & WANT_SAMPLE else () for work in plan.work])
        return Done(StepResult(plan.step, tokens, StepTimes(now, time.monotonic())))

    def prepare_more(self) -> bool:
        """There is nothing to prepare."""
        return False


@dataclass
class Fed:
    """An ``EngineClient`` that keeps ``count`` requests of its own going. Written by ``outputs`` alone."""

    inner: LocalClient
    count: int
    draw: random.Random
    mine: set[str] = field(default_factory=set)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def outputs(self) -> EngineOutput:
        """What the engine says to others, and its record; requests of our own that ended are followed by new ones."""
        while len(self.mine) < self.count:
            request = self.request()
            self.mine.add(request.id)
            self.inner.add(request)
        output = await self.inner.outputs()
        self.mine -= {event.id for event in output.events if event.finish_reason is not None}
        return msgspec.structs.replace(output, events=tuple([e for e in output.events if not e.id.startswith("own-")]))

    def request(self) -> GenerateRequest:
        """The next of our own."""
        draw = self.draw
        prompt = (SHARED if draw.random() < 0.5 else ()) + tuple(draw.choices(range(3, 4000), k=draw.randrange(4, 120)))
        sampling = SamplingParams(max_tokens=draw.randrange(20, 160), seed=1, ignore_eos=True)
        name = f"own-{uuid.UUID(int=draw.getrandbits(128)).hex}"
        return GenerateRequest(id=name, prompt_ids=prompt, sampling=sampling, arrival_s=time.monotonic())


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-per-s", type=float, default=500.0)
    parser.add_argument("--rows", type=int, default=16, help="most sequences in a step")
    parser.add_argument("--blocks", type=int, default=0, help="of the cache; 0: too few for all rows")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    raise_open_files_limit()
    rows, num_blocks = options.rows, options.blocks or options.rows * 9
    config, draw = make_config(port=options.port, served_model_name=("hat",)), random.Random(1)
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    info = EngineInfo(LONGEST, rows, MAX_TOKENS, BLOCK_SIZE, num_blocks, 4096, (), "no device", "none", 0, 0, 0)
    scheduler = Scheduler(Limits(rows, MAX_TOKENS, LONGEST, ()), Allocator((num_blocks,), BLOCK_SIZE))
    engine = Engine(scheduler, Hat(options.steps_per_s, draw), info, time.monotonic)

    async def run() -> int:
        client = Fed(LocalClient(engine), rows + rows // 2, draw)
        llm = AsyncLLM(client, tokenizer, config, metrics_for(config, info))
        app = create_app(llm, config)
        return await serve(app, config, llm, lambda server: print(f"Serving hat on {server.url}", flush=True))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


if __name__ == "__main__":
    sys.exit(main())
