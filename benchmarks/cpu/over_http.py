"""How much of the engine's speed arrives over HTTP, and what each process pays for it.

    python -m benchmarks.cpu.over_http [--rounds 3] [--streams 64] [--threads 2] [--input-len 32] [--output-len 128]
                                       [--model FOLDER] [--paced TOKENS_PER_S] [--quiet-wait SECONDS]

The same requests (random prompt ids, greedy, ignore_eos) run offline, all at once through ``LLM.generate`` in a process of its
own, and as concurrent streams against ``mini-vllm serve``, round after round in turn; medians are shown. Server, engine and
this program, which is the load generator, share the cores. A smaller model shows what happens when the engine is faster
(``--model minivllm/assets/stories-draft``); with ``--paced`` an engine of that speed that needs no core takes the model's place
(``paced.py``).

Each round waits for a quiet machine and says which share of the cores others used all the same; one that was disturbed is
taken again, a few times. A table, then one line of JSON.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.cpu.machine import BUSY_SHARE, CpuClock, await_quiet
from benchmarks.cpu.paced import build_paced
from minivllm.bench.load import Outcome, Pace, Target, run_load
from minivllm.bench.workload import Item, RandomShape, random_items
from minivllm.types import GenerateRequest, SamplingParams

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "benchmarks.cpu.over_http")
VOCAB_SIZE, SPECIAL_IDS = 2000, range(8)  # ids that the bundled models have and that are text
CPU_CLOCK_SCHED = 2  # of clock_getcpuclockid(3): a clock id made of a process's number
NAME = "stories"  # under which the model is served
MAX_ATTEMPTS = 4


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all its threads together."""
    return time.clock_gettime((~pid << 3) | CPU_CLOCK_SCHED)


@dataclass(frozen=True)
class Shape:
    """What runs."""

    streams: int
    input_len: int
    output_len: int
    threads: int
    model: str | None  # none: the bundled one
    paced: float | None  # tokens/s of the paced engine

    def items(self, seed: int) -> list[Item]:
        """Fresh prompts for each seed, so that the prefix cache does not help."""
        return random_items(RandomShape(self.input_len, self.output_len), self.streams, VOCAB_SIZE, SPECIAL_IDS, seed)

    @property
    def step_s(self) -> float:
        """Time of a step of the paced engine."""
        return self.streams / self.paced if self.paced else 0.0

    @property
    def num_tokens(self) -> int:
        """Output tokens of a round."""
        return self.streams * self.output_len


@dataclass(frozen=True)
class Round:
    """The same requests offline and over HTTP. CPU figures are seconds per 1,000 tokens, of all threads of a process."""

    offline_tokens_per_s: float
    tokens_per_s: float
    ratio: float
    offline_cpu_s: float
    engine_cpu_s: float
    server_cpu_s: float
    client_cpu_s: float
    ttft_p50_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tokens_per_event: float
    others_share: float  # of the cores


# ----------------------------------------------------------------------------------------------------------------------
# Offline: a child that runs one batch for each line it reads
# ----------------------------------------------------------------------------------------------------------------------


def offline_child(shape: Shape) -> None:
    """For each seed on stdin, run the batch and print its tokens/s and its CPU seconds per 1,000 tokens."""
    generate = model_batch(shape) if shape.paced is None else paced_batch(shape)
    for line in sys.stdin:
        items = shape.items(int(line))
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        generate(items)
        took_s, used_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        print(json.dumps((shape.num_tokens / took_s, used_s * 1e3 / shape.num_tokens)), flush=True)


def sampling_of(shape: Shape) -> SamplingParams:
    """Greedy, to the full length."""
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=shape.output_len, seed=0)


def model_batch(shape: Shape) -> Callable[[Sequence[Item]], object]:
    """The model, through ``LLM``."""
    from minivllm.llm import LLM

    llm, sampling = LLM(shape.model, num_threads=shape.threads), sampling_of(shape)
    return lambda items: llm.generate([list(item.prompt) for item in items], sampling)


def paced_batch(shape: Shape) -> Callable[[Sequence[Item]], object]:
    """The paced engine, driven as ``LLM.generate`` does."""
    from minivllm.config import make_config
    from minivllm.door import locate, tokenizer_folder
    from minivllm.text.outputs import OutputProcessor
    from minivllm.text.tokenizer import load_tokenizer

    config, folder = locate(make_config(num_threads=shape.threads))
    engine, sampling = build_paced(config, shape.step_s), sampling_of(shape)
    outputs = OutputProcessor(load_tokenizer(tokenizer_folder(config, folder)))

    def generate(items: Sequence[Item]) -> None:
        for i, item in enumerate(items):
            ids = tuple(int(token) for token in item.prompt)
            outputs.add(str(i), ids, sampling)
            engine.add(GenerateRequest(id=str(i), prompt_ids=ids, sampling=sampling, arrival_s=time.monotonic()))
        while engine.has_work:
            if (message := engine.step()) is not None:
                outputs.process(message.events)

    return generate


class Offline:
    """The child's other end. Written by ``main``."""

    def __init__(self, arguments: Sequence[str]) -> None:
        command = [*PROGRAM, *arguments, "--offline-child"]
        self._child = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _read(self) -> str:
        if self._child.stdout is None or not (line := self._child.stdout.readline()):
            raise RuntimeError("the offline process has ended")
        return line

    def measure(self, seed: int) -> tuple[float, float]:
        """Tokens/s and CPU seconds per 1,000 tokens of one batch."""
        if self._child.stdin is None:
            raise RuntimeError("the offline process has no input")
        self._child.stdin.write(f"{seed}\n")
        self._child.stdin.flush()
        rate, used_s = json.loads(self._read())
        return rate, used_s

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Over HTTP
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def server(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """A running server; its address, its process id and its engine's."""
    options = ["--port", "0", "--num-threads", str(shape.threads), "--log-level", "warning"]
    program = ["-m", "minivllm", "serve", *([] if shape.model is None else [shape.model, "--served-model-name", NAME])]
    if shape.paced is not None:
        program = ["-m", "benchmarks.cpu.paced", "serve", "--step-ms", str(shape.step_s * 1e3)]
    command = [sys.executable, *program, *options]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        url = next((found[1] for line in process.stdout if (found := re.search(r"on (http://\S+)", line))), None)
        if url is None:
            raise RuntimeError("the server did not start")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield url, process.pid, int(children[0])
    finally:
        process.terminate()
        process.wait()


def measure_served(shape: Shape, url: str, pids: Sequence[int], seed: int) -> tuple[list[Outcome], float, list[float]]:
    """One round of concurrent streams: what each met, the seconds it took, and CPU seconds per 1,000 tokens of server, engine
    and client."""
    target = Target(url + "/v1/completions", NAME, {"temperature": 0.0, "ignore_eos": True})
    items = shape.items(seed)
    before = [*map(cpu_s, pids), time.process_time()]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes, took_s = runner.run(run_load(target, items, Pace()))
    after = [*map(cpu_s, pids), time.process_time()]
    if failed := [o.error for o in outcomes if not o.ok]:
        raise RuntimeError(failed[0])
    return outcomes, took_s, [1e3 * (b - a) / shape.num_tokens for a, b in zip(before, after, strict=True)]


def measure(shape: Shape, offline: Offline, url: str, pids: Sequence[int], seed: int) -> Round:
    """One round of each kind."""
    begun = CpuClock.now()
    offline_rate, offline_cpu_s = offline.measure(2 * seed)
    outcomes, took_s, (server_s, engine_s, client_s) = measure_served(shape, url, pids, 2 * seed + 1)
    ended = CpuClock.now()
    gaps_ms = np.array([gap for o in outcomes for gap in o.itl_s] or [0.0]) * 1e3
    rate = shape.num_tokens / took_s
    return Round(
        offline_tokens_per_s=offline_rate,
        tokens_per_s=rate,
        ratio=rate / offline_rate,
        offline_cpu_s=offline_cpu_s,
        engine_cpu_s=engine_s,
        server_cpu_s=server_s,
        client_cpu_s=client_s,
        ttft_p50_ms=1e3 * statistics.median(o.ttft_s for o in outcomes),
        itl_p50_ms=float(np.median(gaps_ms)),
        itl_p99_ms=float(np.percentile(gaps_ms, 99)),
        tokens_per_event=shape.num_tokens / sum(len(o.chunk_times_s) for o in outcomes),
        others_share=begun.others_share(ended),
    )


def measure_quietly(once: Callable[[int], Round], number: int, quiet_wait_s: float) -> Round:
    """A round that nobody disturbed, or the least disturbed of a few."""
    attempts: list[Round] = []
    for attempt in range(MAX_ATTEMPTS if quiet_wait_s else 1):
        await_quiet(quiet_wait_s)
        attempts.append(once(number * MAX_ATTEMPTS + attempt))
        if attempts[-1].others_share <= BUSY_SHARE:
            break
    return min(attempts, key=lambda r: r.others_share)


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def read_arguments() -> tuple[Shape, argparse.Namespace]:
    """The command line: what runs, and the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--paced", type=float, metavar="TOKENS_PER_S")
    parser.add_argument("--quiet-wait", type=float, default=30.0, metavar="SECONDS", help="longest wait before a round")
    parser.add_argument("--offline-child", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args()
    return Shape(found.streams, found.input_len, found.output_len, found.threads, found.model, found.paced), found


def table(medians: dict[str, Any]) -> str:
    """The medians as lines."""
    rows = [
        ("tokens/s", medians["offline_tokens_per_s"], medians["tokens_per_s"], ".0f"),
        ("engine CPU s / 1k tokens", medians["offline_cpu_s"], medians["engine_cpu_s"], ".3f"),
        ("server CPU s / 1k tokens", None, medians["server_cpu_s"], ".4f"),
        ("client CPU s / 1k tokens", None, medians["client_cpu_s"], ".4f"),
        ("TTFT p50, ms", None, medians["ttft_p50_ms"], ".1f"),
        ("ITL p50, ms", None, medians["itl_p50_ms"], ".1f"),
        ("ITL p99, ms", None, medians["itl_p99_ms"], ".1f"),
        ("tokens per event", None, medians["tokens_per_event"], ".2f"),
        ("cores used by others, %", None, 100 * medians["others_share"], ".0f"),
        ("ratio", None, medians["ratio"], ".2f"),
    ]
    lines = [f"{'':<28}{'offline':>10}{'HTTP':>10}"]
    lines += [f"{name:<28}{'' if a is None else format(a, form):>10}{format(b, form):>10}" for name, a, b, form in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    shape, found = read_arguments()
    if found.offline_child:
        offline_child(shape)
        return
    offline = Offline(sys.argv[1:])
    try:
        with server(shape) as (url, *pids):
            measure(shape, offline, url, pids, 0)  # a warm-up
            rounds = [
                measure_quietly(lambda seed: measure(shape, offline, url, pids, seed), number, found.quiet_wait)
                for number in range(1, found.rounds + 1)
            ]
    finally:
        offline.close()
    medians = {name: statistics.median(asdict(r)[name] for r in rounds) for name in asdict(rounds[0])}
    print(table(medians))
    print(json.dumps({**asdict(shape), "medians": medians, "rounds": [asdict(r) for r in rounds]}))


if __name__ == "__main__":
    main()
