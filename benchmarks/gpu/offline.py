"""Rows 1 to 13: one engine in this process, one ``generate`` call after another.

    python -m benchmarks.gpu.offline [--model A] [--rows 1,3-9] [--repeats 3] [--out FILE] [--option NAME=VALUE ...]

1, 2    256 and 1,024 sequences: prompts of 100 to 1,024 random ids, 100 to 1,024 new tokens each, temperature 0.6
3 to 7  a decode step at batch 1, 8, 32, 128, 256: (time of 256 new tokens - time of one) / 255, prompts of 128, greedy
8       64 prompts of 1,024, one new token each
9 to 11 one prompt of 1,024, 8,192 and 32,768, one new token: the time to the first token
12, 13  256 prompts that share 2,048 tokens and have 64 of their own, 64 new: with none of it in the cache, and again

All run to their full length. What the engine would prepare behind traffic (captured graphs) is made first, and a row's work is
done once before the clock starts, with other prompts. Every timed call has fresh prompts (but for 13), so that the prefix cache
does none of the work, and the median of the calls counts. ``--engine vllm`` runs the same on vLLM where that is installed, with
``--option`` as its own. Beside each figure: the time that ``generate`` spent outside the engine's steps (turning tokens into
text), how many steps there were, and the prompt tokens found in the cache.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.shapes import MODELS, Model, add_common, chosen_options, chosen_rows
from benchmarks.gpu.table import RecordFile, table

Prompts = list[list[int]]
MAX_ID: Final = 10_000  # of prompts' ids, as in the definition of row 1
DECODE_BATCHES: Final[Mapping[int, int]] = {3: 1, 4: 8, 5: 32, 6: 128, 7: 256}
PROMPT_LENS: Final[Mapping[int, int]] = {9: 1024, 10: 8192, 11: 32768}


class Bench:
    """One engine and the prompts it is given. Written by its own methods."""

    def __init__(self, module: str, model: Model, options: Mapping[str, Any], folder: Path) -> None:
        """``module``: whose ``LLM`` and ``SamplingParams`` are measured."""
        engine = import_module(module)
        self.model = model
        self.rng = random.Random(1)
        self._sampling = engine.SamplingParams
        self._is_ours = module == "minivllm"
        begin_s = time.perf_counter()
        self.llm = engine.LLM(model=str(folder), **options)
        self.start_s = time.perf_counter() - begin_s
        self._step_s, self._num_steps = 0.0, 0
        if self._is_ours:
            self._time_steps()

    def _time_steps(self) -> None:
        """Take the time of the engine's steps while ``generate`` runs them."""
        step = self.llm.engine.step

        def timed() -> Any:
            begin_s = time.perf_counter()
            try:
                return step()
            finally:
                self._step_s += time.perf_counter() - begin_s
                self._num_steps += 1

        self.llm.engine.step = timed

    def prepare(self) -> tuple[float, int, int]:
        """Let the engine make all that it would make behind traffic: seconds, how many things, bytes of the device's memory."""
        begin_s, count, free = time.perf_counter(), 0, free_bytes()
        if self._is_ours:
            while self.llm.engine.prepare_more():
                count += 1
        return time.perf_counter() - begin_s, count, free - free_bytes()

    def fresh(self, count: int, length: int) -> Prompts:
        """Prompts of random ids that were never asked before."""
        ids = range(min(MAX_ID, self.model.shape.vocab_size))
        return [self.rng.choices(ids, k=length) for _ in range(count)]

    def run(self, prompts: Prompts, max_tokens: int | Sequence[int], temperature: float = 0.0) -> dict[str, Any]:
        """One ``generate`` call: its seconds and what is worth knowing of them. Raises RuntimeError when tokens are missing."""
        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        sampling = [self._sampling(max_tokens=n, temperature=temperature, ignore_eos=True) for n in lengths]
        asked: Any = prompts if self._is_ours else [{"prompt_token_ids": ids} for ids in prompts]
        self._step_s, self._num_steps = 0.0, 0
        begin_s = time.perf_counter()
        done = self.llm.generate(asked, sampling)
        took_s = time.perf_counter() - begin_s
        made = sum(len(getattr(c, "outputs", [c])[0].token_ids) for c in done)
        if made != sum(lengths):
            raise RuntimeError(f"{made} of {sum(lengths)} tokens were made")
        found: dict[str, Any] = {"s": took_s}
        if self._is_ours:
            cached = sum(c.num_cached for c in done)
            found |= {"outside_steps_s": took_s - self._step_s, "num_steps": self._num_steps, "num_cached": cached}
        return found


def median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time."""
    return sorted(runs, key=lambda run: run["s"])[len(runs) // 2]


# ----------------------------------------------------------------------------------------------------------------------
# The rows: each returns the record's fields by row
# ----------------------------------------------------------------------------------------------------------------------


def mixed_work(bench: Bench, count: int, seed: int) -> tuple[Prompts, list[int]]:
    """Prompts and output lengths of rows 1 and 2. One seed draws the same numbers for both, so ids are moved on by the count:
    else row 2 would begin with row 1's prompts, which are in the cache."""
    rng, less = random.Random(seed), bench.model.less
    low, high, top = less(100), less(1024), min(MAX_ID, bench.model.shape.vocab_size - 1)
    prompts = [[(rng.randint(0, top) + count) % (top + 1) for _ in range(rng.randint(low, high))] for _ in range(count)]
    return prompts, [rng.randint(low, high) for _ in range(count)]


def throughput(bench: Bench, row: int, repeats: int) -> dict[int, dict[str, Any]]:
    """Rows 1 and 2. Run once: they are long."""
    count = bench.model.less({1: 256, 2: 1024}[row])
    prompts, lengths = mixed_work(bench, count, seed=1 + row)
    bench.run(prompts, [max(1, n // 4) for n in lengths], 0.6)
    prompts, lengths = mixed_work(bench, count, seed=0)
    found = bench.run(prompts, lengths, 0.6)
    counts = {"num_prompt": sum(map(len, prompts)), "num_output": sum(lengths)}
    return {row: {"value": sum(lengths) / found["s"], **counts, **found}}


def decode(bench: Bench, row: int, repeats: int) -> dict[int, dict[str, Any]]:
    """Rows 3 to 7."""
    batch, prompt_len, num_new = bench.model.less(DECODE_BATCHES[row]), bench.model.less(128), bench.model.less(256)
    bench.run(bench.fresh(batch, prompt_len), num_new)
    first = [bench.run(bench.fresh(batch, prompt_len), 1)["s"] for _ in range(repeats)]
    whole = [bench.run(bench.fresh(batch, prompt_len), num_new) for _ in range(repeats)]
    middle, first_s = median_run(whole), statistics.median(first)
    step_ms = 1e3 * (middle["s"] - first_s) / max(1, num_new - 1)
    return {row: {"value": step_ms, "first_s": first_s, "all_s": [run["s"] for run in whole], **middle}}


def prefill(bench: Bench, row: int, repeats: int) -> dict[int, dict[str, Any]]:
    """Row 8: prompt tokens per second."""
    count, length = bench.model.less(64), bench.model.less(1024)
    runs = [bench.run(bench.fresh(count, length), 1) for _ in range(1 + repeats)][1:]
    middle = median_run(runs)
    return {row: {"value": count * length / middle["s"], "all_s": [run["s"] for run in runs], **middle}}


def first_token(bench: Bench, row: int, repeats: int) -> dict[int, dict[str, Any]]:
    """Rows 9 to 11: milliseconds. Short ones are run more often."""
    length = bench.model.less(PROMPT_LENS[row])
    bench.run(bench.fresh(1, length), 1)
    runs = [bench.run(bench.fresh(1, length), 1) for _ in range(repeats * {9: 7, 10: 3, 11: 1}[row])]
    middle = median_run(runs)
    return {row: {"value": 1e3 * middle["s"], "all_s": [run["s"] for run in runs], **middle}}


def shared_prefix(bench: Bench, row: int, repeats: int) -> dict[int, dict[str, Any]]:
    """Rows 12 and 13, each prefix asked twice."""
    less = bench.model.less
    pairs = []
    for _ in range(1 + repeats):
        prefix = bench.fresh(1, less(2048))[0]
        prompts = [prefix + own for own in bench.fresh(less(256), less(64))]
        pairs.append((bench.run(prompts, less(64)), bench.run(prompts, less(64))))
    found = {}
    for number, runs in zip((12, 13), zip(*pairs[1:], strict=True), strict=True):
        middle = median_run(runs)
        found[number] = {"value": middle["s"], "all_s": [run["s"] for run in runs], **middle}
    return found


Measure = Callable[[Bench, int, int], dict[int, dict[str, Any]]]
ROWS: Final[Mapping[int, Measure]] = {  # in the order in which they run: the long row 2 last
    1: throughput,
    **dict.fromkeys(DECODE_BATCHES, decode),
    8: prefill,
    **dict.fromkeys(PROMPT_LENS, first_token),
    12: shared_prefix,
    13: shared_prefix,
    2: throughput,
}


def versions() -> dict[str, str]:
    """What runs, by name."""
    found = {}
    for name in ("torch", "triton", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def free_bytes() -> int:
    """Free memory of the device."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def device_name() -> str:
    """The card's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measure(bench: Bench, rows: Sequence[int], repeats: int, file: RecordFile) -> None:
    """Measure rows; one that fails is a record too, and the others go on."""
    done: set[int] = set()
    for row, function in ROWS.items():
        if row not in rows or row in done:
            continue
        begin_s = time.perf_counter()
        try:
            found = function(bench, row, repeats)
        except Exception as error:
            found = {row: {"error": f"{type(error).__name__}: {error}"}}
            print(f"row {row} failed: {error}", flush=True)
        for number, fields in found.items():
            file.add(row=str(number), **fields, wall_s=time.perf_counter() - begin_s)
        done |= found.keys()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--rows", default="1-13", help="such as 1,3-9; B has no goal for row 2")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of the short rows")
    parser.add_argument("--engine", default="minivllm", help="module whose LLM is measured: minivllm or vllm")
    args = parser.parse_args()
    model = MODELS[args.model]
    options = chosen_options(model, args.option)
    file = RecordFile(args.out, model=model.name)
    bench = Bench(args.engine, model, options, model.folder(args.models_folder))
    if args.engine == "minivllm":
        for note in bench.llm.info.notes:
            print(f"note: {note}")
    prepare_s, num_prepared, graphs_bytes = bench.prepare()
    facts = {"device": device_name(), "versions": versions(), "engine": args.engine, "options": options}
    facts |= {"start_s": bench.start_s, "prepare_s": prepare_s, "num_prepared": num_prepared, "graphs_bytes": graphs_bytes}
    file.add(part="offline", **facts)
    graphs = f"{num_prepared} graphs captured in {prepare_s:.1f} s, {graphs_bytes >> 20} MiB"
    print(f"engine ready in {bench.start_s:.1f} s, {graphs}", flush=True)
    measure(bench, chosen_rows(args.rows), args.repeats, file)
    print(table(file.records))


if __name__ == "__main__":
    main()
