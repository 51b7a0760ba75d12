"""Rows 16 to 18: ``mini-vllm serve`` under load from a client on the same machine.

    python -m benchmarks.gpu.serving [--model A] [--rows 16-18] [--out FILE] [--option NAME=VALUE ...]

Streaming ``/v1/completions`` of 512 random prompt ids and 128 new tokens, greedy, exact lengths: 240 requests that arrive at 8
a second (Poisson), 640 at 32 a second, 1,000 at once, one load after the other on one server, after 16 warm-up requests and
some seconds in which the engine captures its graphs. Times are the client's (``minivllm.bench``). TTFT is from sending a
request to its first token; an ITL is the gap between two events.
"""

import argparse
import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.shapes import MODELS, Model, add_common, chosen_options, chosen_rows, option_flags
from benchmarks.gpu.table import RecordFile, table
from minivllm.bench.load import Pace, Target, run_load
from minivllm.bench.report import ServingWanted, serving_result
from minivllm.bench.workload import RandomShape, random_items
from minivllm.cli.serve import loop_factory, raise_open_files_limit

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SETTLE_S: Final = 20.0
NAME: Final = "bench"  # under which the model is served
INPUT_LEN, OUTPUT_LEN, NUM_WARM_UPS = 512, 128, 16
STOP_TIMEOUT_S: Final = 20.0
LOADS: Final[Mapping[int, tuple[float, int]]] = {16: (8.0, 240), 17: (32.0, 640), 18: (math.inf, 1000)}  # rate, requests
FIGURES: Final[Mapping[int, Mapping[str, str]]] = {  # row's name in the table -> key of the result
    16: {"16 ttft p50": "median_ttft_ms", "16 ttft p99": "p99_ttft_ms"},
    17: {"17 ttft p99": "p99_ttft_ms", "17 itl p50": "median_itl_ms", "17 itl p99": "p99_itl_ms"},
    18: {"18 rate": "output_throughput", "18 itl p99": "p99_itl_ms"},
}
KEPT: Final = ("duration", "completed", "failed", "output_throughput", "max_concurrent_requests")


@contextmanager
def server(
    folder: Path, options: Mapping[str, Any], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A running server and its address; what it says goes to ``log``. Raises RuntimeError when it does not start."""
    flags = option_flags({**options, "served_model_name": NAME, "port": 0})
    command = [sys.executable, "-m", "minivllm", "serve", str(folder), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, **(environment or {})}
        )
        try:
            yield _ready_url(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    """Wait for the line that names the address; what comes before it is kept in the log."""
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if found := re.search(r"on (http://\S+)", line):
            log.with_suffix(".ready").write_text("".join(lines), encoding="utf-8")
            return found[1]
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    raise RuntimeError(f"the server did not start: {' | '.join(tail)} ({log})")


def load(model: Model, url: str, rate: float, count: int, seed: int) -> dict[str, Any]:
    """One load; its figures under the names of ``bench serve``. Raises RuntimeError when a request failed or came short."""
    input_len, output_len = model.less(INPUT_LEN), model.less(OUTPUT_LEN)
    shape = model.shape
    items = random_items(RandomShape(input_len, output_len), count, shape.vocab_size, shape.avoided_ids, seed)
    target = Target(f"{url}/v1/completions", NAME, {"temperature": 0.0, "ignore_eos": True})
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        outcomes, duration_s = runner.run(run_load(target, items, Pace(rate, seed=seed)))
    if failed := [o.error for o in outcomes if not o.ok]:
        raise RuntimeError(f"{len(failed)} of {count} requests failed: {failed[0]}")
    if (made := sum(o.num_output for o in outcomes)) != count * output_len:
        raise RuntimeError(f"{made} of {count * output_len} tokens were made")
    return serving_result(outcomes, duration_s, ServingWanted(percentiles=(50, 99)))


def measure(loaded: Callable[[int], dict[str, Any]], rows: Sequence[int], file: RecordFile) -> None:
    """Measure rows; one that fails is a record too, and the others go on."""
    for row in (row for row in LOADS if row in rows):
        begin_s = time.perf_counter()
        try:
            result = loaded(row)
        except RuntimeError as error:
            file.add(row=next(iter(FIGURES[row])), error=str(error))
            print(f"row {row} failed: {error}", flush=True)
            continue
        kept = {key: value for key, value in result.items() if key in KEPT or key.startswith(("median", "p50", "p99"))}
        for name, key in FIGURES[row].items():
            file.add(row=name, value=result[key], **kept, wall_s=time.perf_counter() - begin_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--rows", default="16-18")
    parser.add_argument("--warm-ups", type=int, default=NUM_WARM_UPS, help="requests before the first load [16]")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds without load after these [20]")
    parser.add_argument("--log", type=Path, default=Path("build/bench-gpu/server.log"), metavar="FILE")
    args = parser.parse_args()
    model = MODELS[args.model]
    options = chosen_options(model, args.option, serving=True)
    raise_open_files_limit()
    file = RecordFile(args.out, model=model.name)

    def loaded(row: int) -> dict[str, Any]:
        rate, count = LOADS[row]
        return load(model, url, rate, model.less(count), seed=row)

    begin_s = time.perf_counter()
    with server(model.folder(args.models_folder), options, args.log) as url:
        file.add(part="serving", options=options, ready_s=time.perf_counter() - begin_s)
        load(model, url, math.inf, args.warm_ups, seed=0)
        time.sleep(args.settle)
        measure(loaded, chosen_rows(args.rows), file)
    print(table(file.records))


if __name__ == "__main__":
    main()
