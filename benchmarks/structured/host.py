"""What grammars cost the engine's own thread, where the device takes no time at all.

    python -m benchmarks.structured.host [--tokenizer FOLDER] [--workers 4] [--rows 64] [--tokens 256] [--vocab 151936]

The engine's loop at depth 1 over a device of which every result is there when it is asked for: a random token of those that the
mask allows. What a step costs here is the least that it costs anywhere. "thread": processor time of the engine's thread, to
which time spent asleep does not count; where there are fewer cores than workers, that is what can be compared. The drawing of
tokens is in a piece of its own, and is not part of either.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.structured.batch import NUM_SCHEMAS, PROMPT_IDS, schemas
from benchmarks.structured.pieces import PIECES, timed_pieces
from minivllm.engine.engine import Engine
from minivllm.engine.grammars import Grammars, GrammarSizes
from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.text.grammar import json_grammar
from minivllm.text.helper import Words
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import (
    ANY_TOKEN,
    BY_BITS,
    WANT_SAMPLE,
    EngineInfo,
    GenerateRequest,
    SamplingParams,
    StepPlan,
    StepResult,
    StepTimes,
)  # fmt: skip

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BLOCK = 16


@dataclass
class NoTime:
    """A device that takes no time, and one launched step of it. Written by the engine's thread."""

    drawn_s: float = 0.0
    drawn_thread_s: float = 0.0

    def launch(self, plan: StepPlan) -> "Launched":
        """See ``engine.Executor``."""
        return Launched(self, plan)

    def prepare_more(self) -> bool:
        """See ``engine.Executor``."""
        return False

    def draw(self, masks: npt.NDArray[np.int32] | None, row: int) -> int:
        """A token that the mask of a row allows."""
        says = ANY_TOKEN if masks is None else int(masks[row, 0])
        if says == ANY_TOKEN:
            return random.randrange(300, 50_000)
        if says != BY_BITS or masks is None:
            return says
        words = np.flatnonzero(masks[row, 1:])
        word = int(random.choice(words))
        bits = int(masks[row, 1 + word]) & 0xFFFFFFFF
        return 32 * word + random.choice([bit for bit in range(32) if bits >> bit & 1])


class Launched:
    """See ``engine.Pending``."""

    def __init__(self, device: NoTime, plan: StepPlan) -> None:
        self.device, self.plan = device, plan
        self.tokens: tuple[tuple[int, ...], ...] = ()

    def sample(self, masks: npt.NDArray[np.int32] | None) -> None:
        """Draw at once; the time does not count."""
        begin_s, begin_thread_s = time.perf_counter(), time.thread_time()
        draw = self.device.draw
        self.tokens = tuple((draw(masks, w.row),) if w.wants & WANT_SAMPLE else () for w in self.plan.work)
        self.device.drawn_s += time.perf_counter() - begin_s
        self.device.drawn_thread_s += time.thread_time() - begin_thread_s

    def result(self) -> StepResult:
        """It is there."""
        return StepResult(self.plan.step, self.tokens, StepTimes(0.0, 0.0))


def make_engine(found: Any, device: NoTime) -> Engine:
    """An engine without a model."""
    tokenizer, rows = load_tokenizer(found.tokenizer), found.rows
    blocks = rows * (-(-(len(PROMPT_IDS) + found.tokens) // BLOCK) + 2)
    limits = Limits(rows, 2048, 1024, (tokenizer.eos_id or 0,))
    info = EngineInfo(1024, rows, 2048, BLOCK, blocks, found.vocab, limits.eos_token_ids, "none", "none", 0, 0, 0)
    words = Words(tokenizer.as_json(), max(found.vocab, tokenizer.vocab_size), tokenizer.known_ids(limits.eos_token_ids))
    grammars = Grammars(lambda: words, GrammarSizes(found.vocab, rows, 2, found.workers))
    return Engine(Scheduler(limits, Allocator((blocks,), BLOCK)), device, info, time.monotonic, 1, grammars)


def run(engine: Engine, sampling: list[SamplingParams], turn: str) -> int:
    """All requests to their ends; the number of steps."""
    for row, params in enumerate(sampling):
        ids = tuple(id_ + row % 7 for id_ in PROMPT_IDS)
        engine.add(GenerateRequest(id=f"{turn}-{row}", prompt_ids=ids, sampling=params, arrival_s=time.monotonic()))
    while engine._preparing:  # compiling is another matter
        engine.step()
    steps = 0
    while engine.has_work:
        output = engine.step()
        steps += output is not None
        if output is not None and any(event.error for event in output.events):
            raise SystemExit(next(event.error for event in output.events if event.error))
    return steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "gpt2")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936, help="of the logits")
    found = parser.parse_args()
    device = NoTime()
    engine = make_engine(found, device)
    grammars = [json_grammar(schema) for schema in schemas()]
    common: dict[str, Any] = {"max_tokens": found.tokens, "seed": 0, "ignore_eos": True}
    held = [{**common, "grammar": grammars[row % NUM_SCHEMAS]} for row in range(found.rows)]
    cases = {
        "no grammar": [SamplingParams(**common)] * found.rows,
        "sampled": [SamplingParams(logprobs=0, **asked) for asked in held],
        "with certain tokens": [SamplingParams(**asked) for asked in held],
    }
    for name, sampling in cases.items():
        random.seed(0)
        run(engine, sampling, "warm " + name)
        with timed_pieces([p for p in PIECES if not p[0].__module__.startswith("minivllm.runner")]) as clocks:
            device.drawn_s = device.drawn_thread_s = 0.0
            begin_s, begin_thread_s = time.perf_counter(), time.thread_time()
            steps = run(engine, sampling, name)
            taken_s, thread_s = time.perf_counter() - begin_s, time.thread_time() - begin_thread_s
        each = [s / steps * 1e3 for s in (taken_s - device.drawn_s, thread_s - device.drawn_thread_s)]
        print(f"{name}: {each[0]:.3f} ms a step, thread {each[1]:.3f} ms, {steps} steps")
        clocks.report(steps)


if __name__ == "__main__":
    main()
