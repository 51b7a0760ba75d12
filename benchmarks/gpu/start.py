"""Rows 14 and 15: from starting the process to the first token, with empty caches and again.

    python -m benchmarks.gpu.start [--model A] [--runs 2] [--out FILE] [--caches FOLDER] [--option NAME=VALUE ...]

Each run starts ``mini-vllm serve``, sends one completion (128 random prompt ids) as soon as the server says that it is ready,
and takes the time of its first streamed token. Whatever is compiled is cached in one folder, which is empty before the first
run: Triton's cache, torch's, the driver's and those under the user's cache folder. A start whose caches are thrown away goes
before: whether the libraries' own files are in the machine's memory depends on what ran on it before. More runs say what varies
(row 15 is their median). Shown are the parts: until ready, the request, and the server's log lines, which bear the time of day.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.serving import NAME, server
from benchmarks.gpu.shapes import MODELS, Model, add_common, chosen_options
from benchmarks.gpu.table import RecordFile, table
from minivllm.bench.client import stream_events
from minivllm.bench.workload import RandomShape, random_items

PROMPT_LEN: Final = 128
CACHES: Final[Mapping[str, str]] = {  # variable -> folder
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "driver",
    "XDG_CACHE_HOME": "user",
}


def environment_of(caches: Path) -> dict[str, str]:
    """Variables that put all caches under one folder."""
    return {name: str(caches.resolve() / part) for name, part in CACHES.items()}


async def first_token_s(url: str, prompt: Any) -> float:
    """Ask for a few tokens; the ``time.perf_counter()`` at which the first came. The rest is read too: nothing is cut off."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "stream": True, "ignore_eos": True, "temperature": 0.0}
    came_s = [time.perf_counter() async for _ in stream_events(f"{url}/v1/completions", body)]
    return came_s[0]


def one_start(model: Model, folder: Path, options: Mapping[str, Any], caches: Path, log: Path) -> dict[str, float]:
    """Seconds from the process's start until it was ready, and to the first token."""
    shape = model.shape
    drawn = RandomShape(model.less(PROMPT_LEN), 8)
    prompt = random_items(drawn, 1, shape.vocab_size, shape.avoided_ids, time.time_ns() % 2**32)[0].prompt
    begin_s = time.perf_counter()
    with server(folder, options, log, environment_of(caches)) as url:
        ready_s = time.perf_counter() - begin_s
        first_s = asyncio.run(first_token_s(url, prompt)) - begin_s
    return {"ready_s": ready_s, "request_s": first_s - ready_s, "value": first_s}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--runs", type=int, default=2, help="starts in all; the median of those after the first is row 15")
    parser.add_argument("--caches", type=Path, metavar="FOLDER", help="keep the caches here; none: a temporary folder")
    parser.add_argument("--logs", type=Path, default=Path("build/bench-gpu"), metavar="FOLDER")
    args = parser.parse_args()
    model = MODELS[args.model]
    options = chosen_options(model, args.option, serving=True)
    folder = model.folder(args.models_folder)
    file = RecordFile(args.out, model=model.name)
    file.add(part="start", options=options)
    later: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        caches: Path = args.caches or Path(temporary)
        if caches.is_dir() and any(caches.iterdir()):
            raise SystemExit(f"{caches} is not empty, so row 14 cannot be measured with it.")
        with tempfile.TemporaryDirectory() as thrown_away:
            one_start(model, folder, options, Path(thrown_away), args.logs / "start-before.log")
        for number in range(args.runs):
            log = args.logs / f"start-{number}.log"
            try:
                found = one_start(model, folder, options, caches, log)
            except Exception as error:
                file.add(row="14" if number == 0 else "15", error=f"{type(error).__name__}: {error}")
                break
            print(f"start {number + 1}: ready {found['ready_s']:.2f} s, request {found['request_s']:.2f} s")
            print(log.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
            if number == 0:
                file.add(row="14", **found)
            else:
                later.append(found)
    if later:
        middle = sorted(later, key=lambda run: run["value"])[(len(later) - 1) // 2]
        file.add(row="15", **middle, all_s=[run["value"] for run in later])
    print(table(file.records))


if __name__ == "__main__":
    main()
