"""Records of a GPU's decode steps with and without graphs, with and without overlap: what chapters 7 and 8 draw from.

    python -m benchmarks.observe.device_steps [--model A] [--rows 1,32] [--steps 60] [--keep 24] [--out FILE]

For each number of rows and each of four ways to run (kernel by kernel or as graphs, one step at a time or the next one launched
before this one is read), requests of 128 random prompt tokens decode greedily until all of them do and everything that would
be captured behind traffic is there; then ``--steps`` steps are timed. The table has the median time from one step's end to the
next one's. ``--out`` keeps the records of some steps of each case as JSON: of ``--keep`` rows in all, and four steps
at least. Exits with 1 where graphs make a step slower.
"""

import argparse
import json
import random
import statistics
import sys
from itertools import pairwise, product
from typing import Any

import msgspec
import torch

from benchmarks.gpu.shapes import MODELS, add_common, chosen_options
from benchmarks.gpu.table import aligned
from minivllm.learn.scenes import Arrival, Session, request_of
from minivllm.records import StepRecord

PROMPT, SETTLE = 128, 40


def decode_steps(options: dict[str, Any], rows: int, steps: int) -> list[StepRecord]:
    """The records of ``steps`` decode steps of ``rows`` rows, after some that are not counted."""
    session = Session(**options)
    while session.engine.prepare_more():
        pass
    ids = random.Random(rows)
    for i in range(rows):
        prompt = tuple(ids.choices(range(1000), k=PROMPT))
        session.engine.add(request_of(Arrival(f"r{i}", prompt, steps + 2 * SETTLE)))
    while session.num_steps < SETTLE + steps:
        session.step()
    session.engine.abort([f"r{i}" for i in range(rows)])
    while session.engine.has_work:
        session.step()
    shown = [record for record in session.records if record.rows]
    return shown[SETTLE : SETTLE + steps]


def step_ms(records: list[StepRecord]) -> float:
    """Median time from one step's end to the next one's."""
    return 1e3 * statistics.median(b.finished_s - a.finished_s for a, b in pairwise(records))


def device_name() -> str:
    """What the steps ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> int:
    """Measure, print, and keep some records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep", type=int, default=24, help="rows of each case whose records are kept in --out")
    asked = parser.parse_args()
    model = MODELS[asked.model]
    folder = model.folder(asked.models_folder)
    small = {"max_model_len": 4096, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 4096}
    own = {"device": "auto", "num_threads": None, **chosen_options(model, asked.option), **small, "model": str(folder)}
    cases, found = [], {}
    for rows, eager, overlap in product(map(int, asked.rows.split(",")), (True, False), (False, True)):
        records = decode_steps({**own, "enforce_eager": eager, "async_scheduling": overlap}, rows, asked.steps)
        found[rows, eager, overlap] = step_ms(records)
        kept = [msgspec.to_builtins(record) for record in records[: max(4, asked.keep // rows)]]
        cases.append({"rows": rows, "graphs": not eager, "overlap": overlap, "step_ms": step_ms(records), "records": kept})
    lines = [["rows", "kernel by kernel", "the same, overlapped", "graphs", "graphs, overlapped"]]
    ways = tuple(product((True, False), (False, True)))
    sizes = dict.fromkeys(rows for rows, *_ in found)
    lines += [[str(rows), *(f"{found[rows, *way]:.3f} ms" for way in ways)] for rows in sizes]
    print(aligned(lines))
    if asked.out is not None:
        told = {"device": device_name(), "torch": torch.__version__, "model": model.shape.name, "cases": cases}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(told) + "\n", encoding="utf-8")
    return int(any(found[rows, False, o] > 1.1 * found[rows, True, o] for rows, _, o in found))


if __name__ == "__main__":
    sys.exit(main())
