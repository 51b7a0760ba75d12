"""What the GPU does in a step: how long it waits between two steps, and which kernels take the time.

    python -m benchmarks.gpu.trace [--model A] [--rows 1,32,256] [--context 256] [--steps 32] [--out FILE] [--traces FOLDER]
                                   [--kernels 20] [--prompts 1x1024,64x1024] [--option NAME=VALUE ...]

Decode: as many requests as ``--rows`` says, each with a context of about ``--context`` tokens, run until all of them decode and
for some steps more; then ``--steps`` steps are recorded with torch's profiler. A kernel belongs to the step whose
``engine.step`` call launched it (its correlation number leads to the launch, whose time lies in that call), so steps stay apart
where the next one is launched before the one before has ended. The gap is from a step's last kernel to the next one's first;
the step is from first kernel to first kernel; ``idle`` is the share of the step in which no kernel ran at all. Recording makes
small kernels in a graph a little slower, so step times here are no result.

``--kernels N``: the N kernels that take most time, per step. ``--prompts COUNTxLENGTH,...`` shows them for prompts with one new
token each; a "step" is one of the engine's then, too. ``--traces``: Chrome traces, one a case, compressed.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.offline import Bench
from benchmarks.gpu.shapes import MODELS, add_common, chosen_options
from benchmarks.gpu.table import RecordFile, aligned
from minivllm.types import GenerateRequest, SamplingParams

MARK: Final = "engine.step"
LAUNCHES: Final = ("cuda_runtime", "cuda_driver")
NUM_SETTLE: Final = 24  # decode steps before the recording
NAME_LEN: Final = 76

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel on the GPU. Times in microseconds of the trace's clock."""

    name: str
    start_us: float
    end_us: float
    step: int


# ----------------------------------------------------------------------------------------------------------------------
# Reading a trace
# ----------------------------------------------------------------------------------------------------------------------


def steps_of(events: Iterable[Event]) -> tuple[list[list[Kernel]], int]:
    """The kernels of each step in the order of their start, and how many kernels no launch was found for.

    A kernel without a launch (some ways to launch leave no event) belongs to the step of the kernel that ran before it.
    """
    whole = [e for e in events if e.get("ph") == "X"]
    begins = sorted((e["ts"], e["ts"] + e["dur"]) for e in whole if e["name"] == MARK and e.get("cat") == "user_annotation")
    starts = [begin for begin, _ in begins]
    launched: dict[int, int] = {}
    for event in whole:
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {}):
            step = bisect_right(starts, event["ts"]) - 1
            launched[event["args"]["correlation"]] = step if step >= 0 and event["ts"] <= begins[step][1] else -1
    steps: list[list[Kernel]] = [[] for _ in starts]
    last, num_lost = -1, 0
    for event in sorted((e for e in whole if e.get("cat") == "kernel"), key=lambda e: float(e["ts"])):
        step = launched.get(event["args"].get("correlation", -1), -2)
        if step == -2:
            step, num_lost = last, num_lost + 1
        if step >= 0:
            steps[step].append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], step))
            last = step
    return [step for step in steps if step], num_lost


def busy_us(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one of them ran; they are in the order of their start."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end_us - max(kernel.start_us, until))
        until = max(until, kernel.end_us)
    return total


def gaps(steps: Sequence[Sequence[Kernel]]) -> dict[str, float]:
    """Medians over the steps: step time, gap to the next step, both shares in percent, kernels a step. Work of one step has no
    gaps. Raises RuntimeError for a trace without kernels."""
    if not steps:
        raise RuntimeError("the trace holds no kernels of a step; was it recorded on a GPU?")
    ends_us = [max(k.end_us for k in step) for step in steps]
    if len(steps) == 1:
        step_us = [ends_us[0] - steps[0][0].start_us]
        gap_us = [0.0]
    else:
        step_us = [after[0].start_us - this[0].start_us for this, after in pairwise(steps)]
        gap_us = [after[0].start_us - end_us for end_us, after in zip(ends_us, steps[1:], strict=False)]
    idle = [100 * (1 - busy_us(step) / took_us) for step, took_us in zip(steps, step_us, strict=False)]
    middle = statistics.median(step_us)
    return {
        "step_us": middle,
        "gap_us": statistics.median(gap_us),
        "gap_percent": 100 * statistics.median(gap_us) / middle,
        "gap_max_us": max(gap_us),
        "idle_percent": statistics.median(idle),
        "kernels_per_step": statistics.median(map(len, steps)),
    }


def top_kernels(steps: Sequence[Sequence[Kernel]], count: int) -> list[dict[str, Any]]:
    """The kernels that take most time: microseconds and launches per step, mean microseconds a launch."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in (k for step in steps for k in step):
        times[kernel.name].append(kernel.end_us - kernel.start_us)
    total_us = sum(map(sum, times.values()))
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name,
            "us_per_step": sum(found) / len(steps),
            "percent": 100 * sum(found) / total_us,
            "per_step": len(found) / len(steps),
            "us_each": sum(found) / len(found),
        }
        for name, found in ordered[:count]
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Making one
# ----------------------------------------------------------------------------------------------------------------------


class Driver:
    """Runs the engine step by step, marking each step in the trace. Written by its own methods."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.engine = bench, bench.llm.engine
        self._num_asked = 0

    def add(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        """Queue greedy requests; returns their ids."""
        ids = []
        for prompt in prompts:
            self._num_asked += 1
            ids.append(f"trace-{self._num_asked}")
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0)
            self.engine.add(GenerateRequest(id=ids[-1], prompt_ids=tuple(prompt), sampling=sampling, arrival_s=0.0))
        return ids

    def step(self) -> int:
        """One marked step; returns the number of requests that got a token."""
        from torch.profiler import record_function

        with record_function(MARK):
            output = self.engine.step()
        return 0 if output is None else sum(bool(e.token_ids) for e in output.events)

    def end(self, ids: Sequence[str]) -> None:
        """End requests and let the engine come to rest."""
        self.engine.abort(ids)
        while self.engine.has_work:
            self.engine.step()

    def decode(self, rows: int, context: int, num_steps: int, trace: Path) -> None:
        """Record decode steps."""
        num_new = num_steps + NUM_SETTLE + 16
        prompts = self.bench.fresh(rows, max(1, context - num_new))
        longest = 4 * (rows * context // 256 + NUM_SETTLE)  # steps that the prompts can take at worst
        ids = self.add(prompts, num_new + longest)
        waited = 0
        while self.step() < rows:
            waited += 1
            if waited > longest:
                raise RuntimeError(f"{rows} rows never decoded together; is max_num_seqs large enough?")
        for _ in range(NUM_SETTLE):
            self.step()
        self._record(trace, lambda: [self.step() for _ in range(num_steps)])
        self.end(ids)

    def prompts(self, count: int, length: int, trace: Path) -> None:
        """Record the steps that prompts take, after the same work was done once."""

        def run() -> None:
            self.add(self.bench.fresh(count, length), 1)
            while self.engine.has_work:
                self.step()

        run()
        self._record(trace, run)

    def _record(self, trace: Path, work: Callable[[], object]) -> None:
        """Run ``work`` under the profiler."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as recorded:
            work()
            if on_gpu:
                torch.cuda.synchronize()
        recorded.export_chrome_trace(str(trace))


def show(record: Mapping[str, Any]) -> str:
    """One case as lines: what a step is like, then its kernels."""
    facts = f"step {record['step_us']:.0f} us, gap {record['gap_us']:.1f} us = {record['gap_percent']:.2f} %, "
    facts += f"longest gap {record['gap_max_us']:.0f} us, idle {record['idle_percent']:.1f} %, "
    lines = [f"{record['case']}: {facts}{record['kernels_per_step']:.0f} kernels, {record['num_steps']} steps"]
    if record["kernels"]:
        rows = [("us/step", "%", "a step", "us each", "kernel")]
        for k in record["kernels"]:
            figures = (k["us_per_step"], k["percent"], k["per_step"], k["us_each"])
            rows.append((*(f"{figure:.1f}" for figure in figures), k["name"][:NAME_LEN]))
        lines.append(aligned(rows))
    return "\n".join(lines)


def keep_trace(path: Path, folder: Path | None, name: str) -> None:
    """Compress a trace into the folder for traces, where one was named and a trace was made."""
    if folder is not None and path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(path.read_bytes()))


def main() -> None:
    """Record and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--rows", default="1,32,256", help="requests that decode together, one case each; empty: none")
    parser.add_argument("--context", type=int, default=256, help="tokens of each at the recording, about")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="show the N that take most time")
    parser.add_argument("--prompts", default="", metavar="COUNTxLENGTH,...", help="record these prompts too")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep the traces here, compressed")
    args = parser.parse_args()
    model = MODELS[args.model]
    bench = Bench("minivllm", model, chosen_options(model, args.option), model.folder(args.models_folder))
    bench.prepare()
    driver = Driver(bench)
    cases: dict[str, Callable[[Path], None]] = {}
    for rows in map(int, filter(None, args.rows.split(","))):
        cases[f"decode-{rows}"] = partial(driver.decode, rows, args.context, args.steps)
    for text in filter(None, args.prompts.split(",")):
        count, _, length = text.partition("x")
        cases[f"prompts-{text}"] = partial(driver.prompts, int(count), int(length))
    file = RecordFile(args.out, model=model.name)
    with tempfile.TemporaryDirectory() as temporary:
        for case, record in cases.items():
            path = Path(temporary) / f"{case}.json"
            try:
                record(path)
                steps, num_lost = steps_of(json.loads(path.read_bytes())["traceEvents"])
                found = gaps(steps)
            except RuntimeError as error:
                file.add(case=case, error=str(error))
                print(f"{case}: {error}", flush=True)
                continue
            finally:
                keep_trace(path, args.traces, f"{model.name}-{case}")
            kernels = top_kernels(steps, args.kernels)
            file.add(case=case, **found, num_steps=len(steps), num_without_launch=num_lost, kernels=kernels)
            print(show(file.records[-1]), flush=True)


if __name__ == "__main__":
    main()
