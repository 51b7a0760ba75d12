"""Twenty thousand faults on purpose, one in each batch of sixteen requests: only the request that is hit may notice.

    python -m benchmarks.reliability.faults [--count 20000] [--workers 2] [--seed 0]

Each worker runs the whole server (ASGI, event loop, engine, runner, in batch-invariant mode) on a tiny random model in one
process; every other one plans a step ahead (``--async-scheduling``). A fault is one of eight exceptions at one of some forty
functions (``tests/support/faults.py``), at a random call about a random request: from then on at every call, or only once;
before the function has done its work, or after. A batch passes when the request that was hit fails with one clear error (after
an accident it may also get its whole answer), the fifteen others are told what they are told without the fault, the engine is
alive, no block, mailbox or text is left, and the scheduler's invariants hold. Exit code 1 when one did not.
"""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from faults import Faults, Tally, inject, quiet, staged, tiny_model

TEMPLATES = 24  # batches that differ in prompts and lengths
EVERY = 500  # faults between two lines of progress


async def run(count: int, seed: int, overlap: bool) -> Tally:
    """One worker's faults."""

    def report(tally: Tally) -> None:
        if tally.faults.total() % EVERY == 0:
            print(f"worker {seed}: {tally.faults.total()} faults, {len(tally.broken)} broken", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder))
        async with staged(model, async_scheduling=overlap) as stage:
            with Faults() as faults, quiet():
                return await inject(stage, faults, count, seed, TEMPLATES, report)


def work(count: int, seed: int, overlap: bool) -> Tally:
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger().setLevel(logging.CRITICAL)
    return asyncio.run(run(count, seed, overlap))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin_s, total = time.monotonic(), Tally()
    shares = [arguments.count // arguments.workers] * arguments.workers
    shares[0] += arguments.count - sum(shares)
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(work, share, arguments.seed + i, i % 2 == 1) for i, share in enumerate(shares)]
        for job in jobs:
            tally = job.result()
            total.faults += Counter(tally.faults)
            total.ended, total.survived = total.ended + tally.ended, total.survived + tally.survived
            total.missed += tally.missed
            total.broken += tally.broken
    count = total.faults.total()
    print(f"\n{count} faults in batches of 16, {time.monotonic() - begin_s:.0f} s")
    print("\n".join(f"  {place:16} {number:6}" for place, number in sorted(total.faults.items())))
    print(f"the request that was hit ended with one clear error {total.ended} times, was served all the same {total.survived}")
    print(f"broken promises: {len(total.broken)}")
    for line in total.broken:
        print(" ", line)
    return int(bool(total.broken) or count < arguments.count)


if __name__ == "__main__":
    sys.exit(main())
