"""What recording costs: the engine with records of tokens, a ring of them and a file, against the same without.

    python -m benchmarks.observe.overhead [--sequences 256] [--tokens 64] [--rounds 7] [--models bundled tiny]

Two engines of the same model generate for the same requests. What is counted is the time that the processor worked for
them, so that others on the machine matter little; of the rounds, the median of the ratios. In serving, what the engine process
does and what the server does run side by side; here one thread does both, and the server has neither texts nor sockets to see
to, so that recording weighs more than it ever does there. The promises: recording takes at most 2 % of the engine process's
throughput, with any model; of all that is done, at most 2 % with the bundled one; and a step's plan and its result together
cost the scheduler at most 150 us and 1.5 us a row.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.reliability.watched import verdict
from minivllm.child import FrameReader, encode
from minivllm.config import BUNDLED_MODEL, Config, make_config
from minivllm.engine.build import build_engine
from minivllm.engine.engine import Engine
from minivllm.kv.allocator import Allocator
from minivllm.observe.metrics import Metrics
from minivllm.observe.recording import Recorder
from minivllm.observe.steps import Steps
from minivllm.records import EngineOutput
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import GenerateRequest, SamplingParams, StepResult, StepTimes

MOST_LOSS = 0.02
STEP_US, ROW_US = 150.0, 1.5  # that a step's plan and result may take the scheduler
PROMPT = 32
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    "hidden_act": "silu", "eos_token_id": 1, "bos_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip


@dataclass
class Side:
    """One of the two that take turns: an engine, and what a server does with what it says."""

    engine: Engine
    steps: Steps | None
    metrics: Metrics
    recorder: Recorder | None = None

    engine_s: float = 0.0  # processor time of what the engine process does
    server_s: float = 0.0  # of what the server does with its records
    num_steps: int = 0

    def step(self, reader: FrameReader) -> None:
        """Go on by a step."""
        began_s = time.thread_time()
        output = self.engine.step()
        frame = b"" if output is None else encode(output)
        told_s = time.thread_time()
        for message in reader.feed(frame):
            self.num_steps += 1
            self.metrics.observe(message.record)
            if self.steps is not None:
                self.steps.add(message.record, 0)
        self.engine_s += told_s - began_s
        self.server_s += time.thread_time() - told_s


def play(sides: Sequence[Side], requests: Sequence[GenerateRequest]) -> None:
    """Both generate for the same requests, a step at a time in turn."""
    readers = [FrameReader(EngineOutput) for _ in sides]
    for side in sides:
        for request in requests:
            side.engine.add(request)
    turn = 0
    while any(side.engine.has_work for side in sides):
        turn += 1
        for i in (0, 1) if turn % 2 else (1, 0):
            if sides[i].engine.has_work:
                sides[i].step(readers[i])


def make_side(model: str, sequences: int, file: Path | None) -> Side:
    """An engine with recording into ``file``, or without any."""
    dummy = {"load_format": "dummy"} if model != str(BUNDLED_MODEL) else {}
    config: Config = make_config(
        model=model, device="cpu", num_threads=1, max_num_seqs=sequences, num_gpu_blocks_override=24 * sequences,
        step_records=0 if file is None else 4096, record_steps=None if file is None else str(file), **dummy,
    )  # fmt: skip
    engine = build_engine(config)
    if file is None:
        return Side(engine, None, Metrics("off"))
    recorder = Recorder(file)
    recorder.begin(engine.info, "overhead")
    return Side(engine, Steps(engine.info.block_size, config.observe.step_records, recorder), Metrics("on"), recorder)


def make_requests(sequences: int, tokens: int, vocab_size: int, seed: int) -> list[GenerateRequest]:
    rng = np.random.default_rng(seed)
    sampling = SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True)
    return [
        GenerateRequest(
            id=f"cmpl-{rng.integers(2**62):032x}", prompt_ids=tuple(rng.integers(2, vocab_size, PROMPT).tolist()),
            sampling=sampling, arrival_s=time.monotonic(),
        )
        for _ in range(sequences)
    ]  # fmt: skip


def compare(model: str, sequences: int, tokens: int, rounds: int) -> tuple[list[tuple[str, object]], float, float]:
    """Rows of the table; what is lost of the engine process's throughput, and of everything's."""
    with tempfile.TemporaryDirectory() as folder:
        if model == "tiny":
            (Path(folder) / "config.json").write_text(json.dumps(TINY))
        name = folder if model == "tiny" else str(BUNDLED_MODEL) if model == "bundled" else model
        off, on = make_side(name, sequences, None), make_side(name, sequences, Path(folder) / "steps")
        if on.recorder is None:
            raise RuntimeError("nothing is recorded")
        writer = time.pthread_getcpuclockid(on.recorder.thread_ident)
        lost: list[tuple[float, float]] = []
        for seed in range(rounds + 1):
            before = (off.engine_s, off.server_s, on.engine_s, on.server_s, time.clock_gettime(writer))
            play((off, on), make_requests(sequences, tokens, off.engine.info.vocab_size, seed))
            after = (off.engine_s, off.server_s, on.engine_s, on.server_s, time.clock_gettime(writer))
            a, b, c, d, e = (y - x for x, y in zip(before, after, strict=True))
            if seed:  # the first warms up
                lost.append((1 - a / c, 1 - (a + b) / (c + d + e)))
        on.recorder.close()
        num_bytes = (Path(folder) / "steps").stat().st_size
    engine, everything = (statistics.median(each) for each in zip(*lost, strict=True))
    step_ms = 1e3 * off.engine_s / off.num_steps
    rate = sequences * tokens * (rounds + 1) / off.engine_s
    rows: list[tuple[str, object]] = [
        (f"{model}: tokens of the engine process a second, without", f"{rate:,.0f}"),
        (f"{model}: a step without, ms", f"{step_ms:.2f}"),
        (f"{model}: lost by recording, of the engine process", f"{engine:.2%}"),
        (f"{model}: lost by recording, of everything in one thread", f"{everything:.2%}"),
        (f"{model}: bytes of the file a step", f"{num_bytes / on.num_steps:,.0f}"),
    ]
    return rows, engine, everything


def scheduler_us(sequences: int, record_tokens: bool) -> Callable[[int], float]:
    """A scheduler with that many rows that decode; what is returned runs steps and says what the quickest took, in us."""
    scheduler = Scheduler(Limits(sequences, 2048, 8192, record_tokens=record_tokens), Allocator((512 * sequences,), 16))
    for request in make_requests(sequences, 8000, 1000, 0):
        scheduler.add(request)

    def run(steps: int) -> float:
        best = float("inf")
        for _ in range(steps):
            began_s = time.thread_time()
            plan = scheduler.schedule(1.0)
            planned_s = time.thread_time()
            if plan is None:
                raise RuntimeError("there is nothing to plan")
            result = StepResult(plan.step, tuple([(5,) if w.wants else () for w in plan.work]), StepTimes(1.0, 2.0))
            taken_s = time.thread_time()
            scheduler.apply(plan, result, 2.0)
            best = min(best, time.thread_time() - taken_s + planned_s - began_s)
        return 1e6 * best

    run(40)
    return run


def run(sequences: int, tokens: int, rounds: int, models: Sequence[str]) -> tuple[list[tuple[str, object]], list[str]]:
    """The table, and what is broken."""
    rows: list[tuple[str, object]] = []
    broken = []
    for model in models:
        more, engine, everything = compare(model, sequences, tokens, rounds)
        rows += more
        if engine > MOST_LOSS:
            broken.append(f"{model}: recording takes {engine:.2%} of the engine process's throughput")
        if model == "bundled" and everything > MOST_LOSS:
            broken.append(f"{model}: recording takes {everything:.2%} of everything's throughput")
    allowed = STEP_US + ROW_US * sequences
    schedulers = {on: scheduler_us(sequences, on) for on in (False, True)}
    took = {on: min(each(60) for _ in range(rounds)) for on, each in schedulers.items()}
    told = f"{took[False]:.0f}, {took[True]:.0f}, {allowed:.0f}"
    rows.append((f"scheduler, {sequences} rows: us a step without, with, allowed", told))
    if took[True] > allowed:
        broken.append(f"the scheduler takes {took[True]:.0f} us a step, over {allowed:.0f}")
    return rows, broken


def main() -> int:
    """0: the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["bundled", "tiny"], help="bundled, tiny, or a folder (random weights)")
    found = parser.parse_args()
    title = f"overhead of recording, {found.sequences} sequences of {found.tokens} tokens, {found.rounds} rounds"
    return verdict(title, *run(found.sequences, found.tokens, found.rounds, found.models))


if __name__ == "__main__":
    sys.exit(main())
