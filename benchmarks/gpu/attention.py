"""Attention on a GPU: checks it, then times ways of cutting it, decodes in TB/s and prompts in TFLOP/s.

    python -m benchmarks.gpu.attention --out attention.json [--models A,B] [--parts few,many,library,turn]

Two models' heads (A: 16 query and 8 KV heads, B: 32 and 8; 128 channels, bfloat16). First ragged mixed steps through the
backend against the definition in float32, with shuffled blocks and NaN wherever no token was written; a captured step must
give the same bits as the same step launched one by one. Then every candidate: checked, and timed as replays of a CUDA graph
that goes round several caches, so that K and V come from memory. A candidate's mean is the geometric mean, over the steps, of
how much longer it takes than the best. Tables last; the exit status is 1 if anything computed wrong numbers.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.attention.base import AttnLayer, AttnMeta, AttnNeed, DeviceMeta, KVLayer, QKNorm
from minivllm.attention.long_prompts import GRAIN, Library, LongPrompts, find_library
from minivllm.attention.triton import TritonAttention
from minivllm.kernels import reference
from minivllm.kernels.ops import reference_ops
from minivllm.kernels.triton.attention import PagedAttention
from minivllm.kernels.triton.attention_plan import Planner
from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shape, Shapes, Sizes, Step, usual_shapes
from minivllm.kernels.triton.chip import this_chip

DEVICE, DTYPE, HEAD_DIM, BLOCK_SIZE = torch.device("cuda"), torch.bfloat16, 128, 16
SCALE = HEAD_DIM**-0.5
MODELS = {"A": Sizes(16, 8, HEAD_DIM, DTYPE), "B": Sizes(32, 8, HEAD_DIM, DTYPE)}
COLD_BYTES = 200 * 2**20  # the caches of a round: four times the L2 cache
Rows = list[tuple[int, int]]  # of a step: tokens in the cache before, tokens of the step

RAGGED = [(n - 1, 1) for n in np.random.default_rng(0).integers(100, 2000, 256).tolist()]
DECODES: dict[str, Rows] = {
    **{f"{b} x 384": [(383, 1)] * b for b in (1, 8, 32, 128)},
    **{f"{b} x {n}": [(n - 1, 1)] * b for b, n in ((256, 256), (256, 1024), (1, 32768))},
    "256 x 100..2000": RAGGED,
}
PROMPTS: dict[str, Rows] = {
    "1 x 1k": [(0, 1024)], "8 x 1k": [(0, 1024)] * 8, "1 x 8k": [(0, 8192)], "1 x 32k": [(0, 32768)],
    "8k after 24k": [(24576, 8192)], "2k after 1k": [(1000, 2048)],
}  # fmt: skip
FEW = [Shape(16, n, w, s) for n, w, s in (
    (32, 4, 3), (32, 4, 5), (32, 2, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 2, 3), (64, 8, 3), (128, 4, 2), (128, 8, 2),
    (128, 8, 3))]  # fmt: skip
PER_SM = (1, 2, 3, 4)
MANY = [Shape(*sizes) for sizes in (
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2),
    (64, 64, 4, 3), (64, 128, 4, 2), (256, 64, 8, 3))]  # fmt: skip
INVARIANT = [Shape(64, 64, 4, 2), Shape(64, 64, 4, 3), Shape(64, 32, 4, 4), Shape(64, 128, 4, 2), Shape(64, 64, 8, 3)]


@dataclass
class Bed:
    """A step of random tokens, and as many caches as make a round."""

    sizes: Sizes
    rows: Rows
    q: Tensor
    caches: list[tuple[Tensor, Tensor]]
    query_starts: Tensor
    context_lens: Tensor
    tables: Tensor

    @property
    def kv_bytes(self) -> int:
        return sum(a + b for a, b in self.rows) * self.sizes.num_kv_heads * HEAD_DIM * DTYPE.itemsize * 2

    @property
    def operations(self) -> int:
        visible = sum(new * past + new * (new + 1) // 2 for past, new in self.rows)
        return 4 * visible * self.sizes.num_heads * HEAD_DIM

    @property
    def single(self) -> bool:
        return all(new == 1 for _, new in self.rows)


def make_bed(sizes: Sizes, rows: Rows) -> Bed:
    """Blocks of all rows shuffled among each other."""
    counts = [-(-(a + b) // BLOCK_SIZE) for a, b in rows]
    ids = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(rows), max(counts)), dtype=np.int32)
    for i, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
        tables[i, : len(part)] = part
    starts, contexts = np.cumsum([0, *(new for _, new in rows)]), np.array([a + b for a, b in rows])
    shape = (sum(counts), sizes.num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    on_device = (torch.from_numpy(x).to(DEVICE, torch.int32) for x in (starts, contexts, tables))
    q = torch.randn(int(starts[-1]), sizes.num_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    bed = Bed(sizes, rows, q, [], *on_device)
    num_caches = max(2, min(64, -(-COLD_BYTES // bed.kv_bytes))) if bed.single else 1
    bed.caches = [tuple(torch.empty(shape, device=DEVICE, dtype=DTYPE).normal_() for _ in "kv") for _ in range(num_caches)]  # type: ignore[misc]
    return bed


def graph_us(launches: Sequence[Callable[[], Any]], repeats: int = 1) -> float:
    """Median time of one launch, in replays of a graph that makes all of them ``repeats`` times."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return statistics.median(times) / (len(launches) * repeats)


def expected(bed: Bed, row: int) -> Tensor:
    """The results of a row over the first cache."""
    past, new = bed.rows[row]
    blocks = bed.tables[row, : -(-(past + new) // BLOCK_SIZE)].long()
    k, v = (x[blocks].transpose(1, 2).flatten(0, 1)[: past + new] for x in bed.caches[0])
    start = int(bed.query_starts[row])
    return reference.attention(bed.q[start : start + new].float(), k, v, past, SCALE, None)


def wrong(found: Tensor, true: Tensor) -> float:
    """The largest error, as a share of the largest number; NaN counts as infinite."""
    return float(((found.float() - true).abs().max() / true.abs().max()).nan_to_num(math.inf))


class Candidate:
    """A way of cutting the kernels."""

    def __init__(self, sizes: Sizes, shapes: Shapes) -> None:
        self.sizes, self.shapes = sizes, shapes
        self.kernels = PagedAttention(this_chip(DEVICE), sizes, shapes, DEVICE)
        self.planner = Planner(this_chip(DEVICE), self.kernels.tiling, sizes.num_kv_heads, (None,), DEVICE)

    def launch(self, bed: Bed, many: bool, out: Tensor | None = None) -> Callable[[int], None]:
        """``launch(i)`` attends over the i-th cache."""
        parts = self.planner.plan(bed.query_starts, bed.context_lens)
        rows = torch.arange(len(bed.rows), dtype=torch.int32, device=DEVICE)
        step = Step(parts, bed.tables, rows, bed.context_lens, bed.single)
        kernel, out = self.kernels.many if many else self.kernels.few, torch.empty_like(bed.q) if out is None else out
        return lambda i: kernel(step, bed.q, out, bed.caches[i], SCALE, SEES_ALL)

    def error(self, bed: Bed, many: bool) -> float:
        out = torch.full_like(bed.q, torch.nan)
        self.launch(bed, many, out)(0)
        return max(
            wrong(out[int(bed.query_starts[i]) : int(bed.query_starts[i + 1])], expected(bed, i)) for i in range(len(bed.rows))
        )

    def us(self, bed: Bed, many: bool) -> float:
        launch = self.launch(bed, many)
        repeats = 1 if bed.operations > 1e11 or len(bed.caches) > 8 else 8
        return graph_us([partial(launch, i) for i in range(len(bed.caches))], repeats)


def candidates(sizes: Sizes, part: str) -> dict[str, Candidate]:
    """By name; those that do not fit the chip are left out. Compiled by several threads."""
    usual, made = usual_shapes(sizes, invariant=part == "invariant"), {}
    if part == "few":
        both = [replace(usual, few=shape, programs_per_sm=n) for shape in FEW for n in PER_SM]
        made = {f"{s.few.tile_n} w{s.few.num_warps} s{s.few.num_stages} p{s.programs_per_sm}": s for s in both}
    else:
        shapes = MANY if part == "many" else INVARIANT
        made = {f"{s.tile_m}x{s.tile_n} w{s.num_warps} s{s.num_stages}": replace(usual, many=s) for s in shapes}
    bed = make_bed(sizes, [(300, 1), (40, 1), (1000, 1)] if part == "few" else [(300, 70), (0, 200)])

    def compile_one(name: str) -> tuple[str, Candidate | None]:
        torch.cuda.set_device(0)
        try:
            one = Candidate(sizes, made[name])
            one.launch(bed, part != "few")(0)
        except Exception as refused:
            print(f"{part} {name}: {type(refused).__name__}: {str(refused)[:90]}")
            return name, None
        return name, one

    # One of each compiled shape first: threads that need the same kernel would each compile it.
    first = [name for name in made if part != "few" or name.endswith(f"p{PER_SM[0]}")]
    with ThreadPoolExecutor(16) as pool:
        found = dict(pool.map(compile_one, first))
    fits = {name.rsplit(" p", 1)[0] for name, one in found.items() if one is not None}
    found.update(compile_one(name) for name in made if name not in found and name.rsplit(" p", 1)[0] in fits)
    torch.cuda.synchronize()
    kept = {}
    for name, one in found.items():
        if one is None:
            continue
        if (error := one.error(bed, part != "few")) > 0.02:
            FAILURES.append(f"{part} {name}: error {error:.3f}")
        else:
            kept[name] = one
    return kept


FAILURES: list[str] = []


# ----------------------------------------------------------------------------------------------------------- the backend


def need_of(sizes: Sizes, **changes: Any) -> AttnNeed:
    heads = (sizes.num_heads, sizes.num_kv_heads, HEAD_DIM)
    return replace(AttnNeed(*heads, (None,), BLOCK_SIZE, DTYPE, DTYPE, DEVICE, batch_invariant=False), **changes)


def check_backend(sizes: Sizes, invariant: bool) -> dict[str, float]:
    """A prompt step, a mixed step and a decode step over the same cache; errors of each."""
    backend = TritonAttention(need_of(sizes, batch_invariant=invariant), replace(reference_ops(), chip=this_chip(DEVICE)))
    layer = AttnLayer(sizes.num_heads, sizes.num_kv_heads, HEAD_DIM, SCALE, None)
    lengths = [1030, 2200, 300, 17, 3000, 64, 1024]
    cuts = [[1024, 1024, 250, 0, 2048, 63, 0], [1, 1100, 3, 16, 951, 0, 1023], [1] * 7]
    all_heads = sizes.num_heads + 2 * sizes.num_kv_heads
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = [torch.randn(n, all_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE, generator=generator) for n in lengths]
    counts = [-(-n // BLOCK_SIZE) for n in lengths]
    ids = random.Random(0).sample(range(1, sum(counts) + 1), sum(counts))
    table = np.full((len(lengths), max(counts)), 1 << 30, dtype=np.int32)
    for i, count in enumerate(counts):
        table[i, :count] = [ids.pop() for _ in range(count)]
    cache = KVLayer(*(torch.full(backend.pool_shapes(sum(counts) + 1)[0], torch.nan, device=DEVICE, dtype=DTYPE) for _ in "kv"))
    done, errors = [0] * len(lengths), {}
    for which, cut in zip(("prompts", "mixed", "decodes"), cuts, strict=True):
        work = [i for i, n in enumerate(cut) if n]
        at = [np.arange(done[i], done[i] + cut[i]) for i in work]
        blocks = [table[i, p // BLOCK_SIZE].astype(np.int64) for i, p in zip(work, at, strict=True)]
        slots = [block * BLOCK_SIZE + p % BLOCK_SIZE for block, p in zip(blocks, at, strict=True)]
        starts, ends = np.cumsum([0, *(cut[i] for i in work)]), np.array([done[i] + cut[i] for i in work])
        meta = AttnMeta(starts, ends, np.array(work), table, BLOCK_SIZE, torch.from_numpy(np.concatenate(slots)).to(DEVICE))
        step = torch.cat([heads[i][done[i] : done[i] + cut[i]] for i in work])
        found = backend.run(backend.plan(meta), layer, step, None, cache)
        worst = 0.0
        for place, i in enumerate(work):
            q, k, v = heads[i][: ends[place]].split((sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads), dim=1)
            true = reference.attention(q[done[i] :].float(), k, v, done[i], SCALE, None)
            worst = max(worst, wrong(found[starts[place] : starts[place + 1]], true))
            done[i] = int(ends[place])
        errors[which] = worst
        if worst > 0.02:
            FAILURES.append(f"backend, {which}, invariant={invariant}: error {worst:.3f}")
    return errors


def check_capture(sizes: Sizes) -> None:
    """Sixteen layers of a decode step, one after the other in a graph: the bits of the same launched with waits between."""
    bed = make_bed(sizes, [(n, 1) for n in (1, 200, 900, 3000, 40, 700)])
    backend = TritonAttention(need_of(sizes), replace(reference_ops(), chip=this_chip(DEVICE)))
    weight, turn = torch.rand(2, HEAD_DIM, device=DEVICE, dtype=DTYPE), torch.rand(6, HEAD_DIM // 2, device=DEVICE)
    layer = AttnLayer(sizes.num_heads, sizes.num_kv_heads, HEAD_DIM, SCALE, None, QKNorm(weight[0], weight[1], 1e-6))
    last = bed.context_lens - 1
    slots = bed.tables[torch.arange(6, device=DEVICE), last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)
    meta = DeviceMeta(bed.query_starts, bed.context_lens, rows, bed.tables, slots, BLOCK_SIZE, decode=True, host=None)
    heads = torch.randn(16, 6, sizes.num_heads + 2 * sizes.num_kv_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    angles = (turn.cos(), turn.sin())

    def step(between: Callable[[], None]) -> list[Tensor]:
        found, plan = [], backend.plan_on_device(meta)
        for i in range(16):
            found.append(backend.run(plan, layer, heads[i], angles, KVLayer(*bed.caches[0])))
            between()
        return found

    one_by_one = step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(lambda: None)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(one_by_one, captured, strict=True)):
            FAILURES.append("a captured step has other bits than one launched with waits")
            return


def time_turn(sizes: Sizes, num_tokens: int) -> tuple[float, float]:
    """Microseconds of the pass in front of attention, and of it and a decode step over contexts of 384."""
    bed = make_bed(sizes, [(383, 1)] * num_tokens)
    backend = TritonAttention(need_of(sizes), replace(reference_ops(), chip=this_chip(DEVICE)))
    weight, turn = torch.rand(2, HEAD_DIM, device=DEVICE, dtype=DTYPE), torch.rand(num_tokens, HEAD_DIM // 2, device=DEVICE)
    layer = AttnLayer(sizes.num_heads, sizes.num_kv_heads, HEAD_DIM, SCALE, None, QKNorm(weight[0], weight[1], 1e-6))
    slots = bed.tables[:, 383 // BLOCK_SIZE].long() * BLOCK_SIZE + 383 % BLOCK_SIZE
    rows = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
    meta = DeviceMeta(bed.query_starts, bed.context_lens, rows, bed.tables, slots, BLOCK_SIZE, decode=True, host=None)
    heads = torch.randn(num_tokens, sizes.num_heads + 2 * sizes.num_kv_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    plan, norm = backend.plan_on_device(meta), (weight[0], weight[1], 1e-6)
    angles = (turn.cos(), turn.sin())
    alone = graph_us([partial(backend._turn.turn_and_write, heads, norm, angles, c, slots) for c in bed.caches], 4)
    return alone, graph_us([partial(backend.run, plan, layer, heads, angles, KVLayer(*c)) for c in bed.caches])


def time_library(library: Library, bed: Bed) -> tuple[float, float]:
    """Microseconds of a prompt by the library, and of its first call with these sizes."""
    long = LongPrompts(need_of(bed.sizes), this_chip(DEVICE), library)
    starts, contexts = bed.query_starts.cpu().numpy().astype(np.int64), bed.context_lens.cpu().numpy().astype(np.int64)
    slots = torch.empty(0, dtype=torch.int64)
    meta = AttnMeta(starts, contexts, np.arange(len(bed.rows)), np.zeros((1, 1), dtype=np.int32), BLOCK_SIZE, slots)
    step = long.plan(meta, bed.tables)
    if step is None:
        return math.nan, math.nan
    k = torch.randn(len(bed.q), bed.sizes.num_kv_heads, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    out, times = torch.empty_like(bed.q), []
    for _ in range(8):
        torch.cuda.synchronize()
        before = time.perf_counter()
        long.attend(step, (bed.q, k, k), out, bed.caches[0], SCALE)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - before) * 1e6)
    return statistics.median(times[2:]), times[0]


# ---------------------------------------------------------------------------------------------------------------- report


def compare(model: str, part: str, steps: dict[str, Rows], lines: list[str]) -> list[dict[str, Any]]:
    """Time every candidate on every step."""
    sizes, many = MODELS[model], part != "few"
    found, records = candidates(sizes, part), []
    ratios: dict[str, list[float]] = {name: [] for name in found}
    for title, rows in steps.items():
        bed = make_bed(sizes, rows)
        times = {name: one.us(bed, many) for name, one in found.items()}
        ranked = sorted(times, key=times.__getitem__)
        for name, us in times.items():
            ratios[name].append(us / times[ranked[0]])
            rate = bed.operations / us / 1e6 if many and not bed.single else bed.kv_bytes / us / 1e6
            records.append({"model": model, "part": part, "step": title, "shape": name, "us": us, "rate": rate})
        best = "   ".join(f"{name}: {times[name]:8.1f} us {rate_of(bed, many, times[name])}" for name in ranked[:3])
        lines.append(f"{model} {part:9} {title:16} {best}")
        del bed
    means = {name: statistics.geometric_mean(of) for name, of in ratios.items() if of}
    ranked = sorted(means, key=means.__getitem__)
    lines.append(f"{model} {part:9} mean             " + "   ".join(f"{name}: {means[name]:.3f}" for name in ranked[:6]))
    return records


def rate_of(bed: Bed, many: bool, us: float) -> str:
    return f"{bed.operations / us / 1e6:5.0f} TFLOP/s" if many and not bed.single else f"{bed.kv_bytes / us / 1e6:5.2f} TB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every figure")
    parser.add_argument("--models", default="A,B")
    parser.add_argument("--parts", default="few,many,invariant,library,turn")
    options = parser.parse_args()
    models, parts = options.models.split(","), options.parts.split(",")
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    for model in models:
        sizes = MODELS[model]
        for invariant in (False, True):
            errors = check_backend(sizes, invariant)
            lines.append(f"{model} errors, invariant={invariant}: " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))
        check_capture(sizes)
        some = {"256 x 384": [(383, 1)] * 256, "1 x 8k": PROMPTS["1 x 8k"]}
        for part, steps in (("few", DECODES), ("many", PROMPTS), ("invariant", some)):
            if part in parts:
                records += compare(model, part, steps, lines)
        library, note = find_library(need_of(sizes))
        lines.append(note)
        for title, rows in PROMPTS.items() if library is not None and "library" in parts else ():
            bed = make_bed(sizes, rows)
            us, first_us = time_library(library, bed)  # type: ignore[arg-type]
            what = f"{us:8.1f} us {rate_of(bed, True, us)}, first call {first_us / 1e3:.0f} ms"
            lines.append(f"{model} library   {title:16} {what}")
            records.append({"model": model, "part": "library", "step": title, "us": us, "first_us": first_us})
        for num_tokens in (1, 32, 256) if "turn" in parts else ():
            alone, both = time_turn(sizes, num_tokens)
            lines.append(f"{model} turn      {num_tokens:4} tokens      {alone:8.1f} us, with attention: {both:.1f} us")
            records.append({"model": model, "part": "turn", "num_tokens": num_tokens, "us": alone, "both_us": both})
    chip, usual = this_chip(DEVICE), {name: asdict(usual_shapes(sizes, invariant=False)) for name, sizes in MODELS.items()}
    report = {"chip": chip.name, "torch": torch.__version__, "usual": usual, "grain": GRAIN, "failures": FAILURES}
    report["figures"] = records
    options.out.write_text(json.dumps(report, indent=1))
    print("\n".join(lines))
    print("\n".join(FAILURES) or "all right")
    sys.exit(1 if FAILURES else 0)


if __name__ == "__main__":
    main()
