"""An engine of a chosen speed: the real scheduler, process and frames around a runner that has no model.

Its steps take time and no core, so what is measured is what the server and the client cost by themselves, and how fast they can
be. (What is left of a model's speed when they want its cores is measured with a model.)

    python -m benchmarks.cpu.paced serve --step-ms 8 [mini-vllm serve options]
    python -m benchmarks.cpu.paced engine --step-ms 8 DESCRIPTOR                         (the server starts this one)
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvloop

from minivllm.config import Config
from minivllm.door import locate, tokenizer_folder
from minivllm.engine.engine import Engine
from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import WANT_SAMPLE, EngineInfo, StepPlan, StepResult, StepTimes

STORY = "Once upon a time there was a little fox. She had a red ball, and she loved to play with it in the green garden. "
MAX_MODEL_LEN, NUM_BLOCKS, BLOCK_SIZE = 2048, 8193, 16


@dataclass
class PacedStep:
    """A launched step. Waits when its result is asked for."""

    result_of: StepResult
    spend: Callable[[], None]

    def sample(self, masks: None) -> None:
        """Nothing is left to do."""

    def result(self) -> StepResult:
        """Take the step's time, then answer."""
        self.spend()
        return self.result_of


class PacedRunner:
    """Every row says the same story. Driven by the engine's thread."""

    def __init__(self, story: Sequence[int], spend: Callable[[], None]) -> None:
        self._story = [(token,) for token in story]
        self._spend = spend

    def launch(self, plan: StepPlan) -> PacedStep:
        """One token for every row that wants one."""
        token = self._story[plan.step % len(self._story)]
        tokens = tuple(token if work.wants & WANT_SAMPLE else () for work in plan.work)
        return PacedStep(StepResult(plan.step, tokens, StepTimes(0.0, 0.0)), self._spend)

    def prepare_more(self) -> bool:
        """There is nothing to prepare."""
        return False


def waiting(step_s: float) -> Callable[[], None]:
    """A step that takes time and no core; a step that came late is not made up for."""
    due_s = 0.0

    def spend() -> None:
        nonlocal due_s
        now_s = time.perf_counter()
        due_s = max(now_s, due_s + step_s)
        if due_s > now_s:
            time.sleep(due_s - now_s)

    return spend


def build_paced(config: Config, step_s: float) -> Engine:
    """The engine, as ``engine.build.build_engine`` would make it."""
    config, folder = locate(config)
    tokenizer = load_tokenizer(tokenizer_folder(config, folder))
    scheduling = config.scheduler
    limits = Limits(scheduling.max_num_seqs, scheduling.max_num_batched_tokens, MAX_MODEL_LEN)
    info = EngineInfo(
        MAX_MODEL_LEN, limits.max_num_seqs, limits.max_num_batched_tokens, BLOCK_SIZE, NUM_BLOCKS, tokenizer.vocab_size, (),
        "cpu", "none", 0, 0, 0,
    )  # fmt: skip
    runner = PacedRunner(tokenizer.encode(STORY, add_special_tokens=False), waiting(step_s))
    return Engine(Scheduler(limits, Allocator((NUM_BLOCKS,), BLOCK_SIZE)), runner, info, time.monotonic)


async def serve_paced(config: Config, program: Sequence[str]) -> int:
    """Serve as ``mini-vllm serve`` does, on an engine that is ``program``."""
    from minivllm.async_llm import AsyncLLM
    from minivllm.engine.supervisor import start_engine
    from minivllm.observe.metrics import metrics_for
    from minivllm.server.application import create_app
    from minivllm.server.http import serve

    config, folder = locate(config)
    client = await start_engine(config, program)
    llm = AsyncLLM(client, load_tokenizer(tokenizer_folder(config, folder)), config, metrics_for(config, client.info))
    try:
        return await serve(create_app(llm, config), config, llm, lambda s: print(f"Serving on {s.url}", flush=True))
    finally:
        await llm.close()


def main() -> int:
    """Be the server, or the engine behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("serve", "engine"))
    parser.add_argument("--step-ms", type=float, required=True)
    found, rest = parser.parse_known_args()
    if found.role == "engine":
        from minivllm.engine.zygote import serve_steps

        return serve_steps(int(rest[0]), lambda config: build_paced(config, found.step_ms / 1e3))
    from minivllm.cli.options import ALL_SECTIONS, Parser, add_config, add_model_argument, read_config

    options = Parser("serve", "Serve on a paced engine.", "[options]")
    add_model_argument(options)
    add_config(options, ALL_SECTIONS)
    config = read_config(options.read(rest))
    program = ("-m", "benchmarks.cpu.paced", "engine", "--step-ms", str(found.step_ms))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve_paced(config, program))


if __name__ == "__main__":
    sys.exit(main())
