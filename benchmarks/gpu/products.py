"""Matrix products on a GPU: checks them, finds the best kernel for each shape, and writes the table of choices that ships.

    python -m benchmarks.gpu.products --out minivllm/kernels/triton/choices/nvidia-h100-80gb-hbm3.json
        [--shapes A,B] [--rows 1,2,4,8,16,32,64,128] [--fixed-rows 1,64,256,2048,8192]

Two models' matrices (A: Qwen3-0.6B, B: Llama-3.1-8B). Every candidate is compiled (some threads at once), compared with float64
over outputs that held NaN before, and timed as replays of a CUDA graph in which copies of the matrix take turns, so that
weights come from memory and not from the L2 cache. "Chain" has between any two products a small kernel that reads the one's
result and writes the other's input, as a norm would; "alone" has only products. The choice falls by "chain", where the
library's product must be beaten by ``MARGIN``. Then the fixed tiles of the batch-invariant mode, beside the library and beside
the next smaller and larger tile; their bits are compared across tiles and numbers of rows. Tables last; the exit status is 1
if anything computed wrong numbers.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from minivllm.kernels import reference
from minivllm.kernels.choices import LIBRARY, ROW_BUCKETS, ChoiceTable, ProductChoice, ProductKey, read_choices, write_choices
from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton.chip import Chip, let_next_start, this_chip, wait_for_previous
from minivllm.kernels.triton.elementwise import Elementwise
from minivllm.kernels.triton.fixed_tiles import TILES, FixedTiles, Tile, tile_for
from minivllm.kernels.triton.products import Products, wide_product

MARGIN = 0.98  # of the library's time, at most, or the library is chosen
COLD_BYTES = 160 * 2**20  # the copies of a matrix, together: three times the L2 cache
SHARED_BYTES = 200 * 1024  # of a candidate at most
DEVICE, DTYPE, ACTIVATION = torch.device("cuda"), torch.bfloat16, "silu"
SHORTLIST = 5  # candidates of 16 rows that are also timed for fewer


@dataclass(frozen=True)
class Shape:
    """A matrix of a model, and what is done with it."""

    name: str
    op: str
    num_out: int  # of a gated pair, both
    num_in: int

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.num_out // 2 if self.op == "gated_linear" else self.num_out


def shapes_of(model: str, hidden: int, heads: int, qkv: int, between: int, vocab: int) -> list[Shape]:
    """The matrices of a decoder; ``heads`` is the width of its attention's output."""
    body = [("qkv", "linear", qkv, hidden), ("o", "linear", hidden, heads), ("gate+up", "gated_linear", 2 * between, hidden)]
    rest = [("down", "linear", hidden, between), ("head", "logits", vocab, hidden)]
    return [Shape(f"{model} {name}", *sizes) for name, *sizes in body + rest]  # type: ignore[arg-type]


MODELS = {
    "A": shapes_of("A", 1024, 2048, 4096, 3072, 151936),
    "B": shapes_of("B", 4096, 4096, 6144, 14336, 128256),
}
Launch = Callable[[int], Tensor]  # the i-th product of a chain


@triton.jit
def _between(x_ptr, result_ptr, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Read the beginning of a row of a result, write the same row of x: as it was."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * DIM + at, mask=at < DIM)
    seen = tl.load(result_ptr + row * stride + tl.arange(0, 256)).to(tl.float32)
    tl.store(x_ptr + row * DIM + at, tl.where(tl.max(seen, 0) > 1e30, 0.0, x), mask=at < DIM)


@dataclass
class Bench:
    """One shape with its copies of the weights."""

    chip: Chip
    shape: Shape
    products: Products
    copies: list[Matrix]
    x: Tensor  # [most rows, num_in]
    exact: Tensor  # [most rows, width] float64, before any rounding
    gate: Callable[[Tensor, str], Tensor]

    @staticmethod
    def of(chip: Chip, shape: Shape) -> "Bench":
        """Random weights such that results are about as large as one."""
        gate = Elementwise(chip).gated_activation
        products, size = Products(chip, ChoiceTable(chip.name), gate), (shape.num_out, shape.num_in)
        num_copies = max(2, -(-COLD_BYTES // (shape.num_out * shape.num_in * DTYPE.itemsize)))
        torch.manual_seed(0)
        drawn = [torch.randn(size, device=DEVICE, dtype=DTYPE) * shape.num_in**-0.5 for _ in range(num_copies)]
        x = torch.randn(ROW_BUCKETS[-1], shape.num_in, device=DEVICE, dtype=DTYPE)
        exact = x.double() @ drawn[0].double().t()
        return Bench(chip, shape, products, [products.pack(one, None) for one in drawn], x, exact, gate)

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.shape.op == "logits" else DTYPE

    @property
    def bend(self) -> str:
        return ACTIVATION if self.shape.op == "gated_linear" else ""

    def ours(self, choice: ProductChoice, x: Tensor) -> Launch:
        """Launches of one of our kernels."""
        plan = self.products.plan_as(choice, self.copies[0], self.bend)
        return lambda i: self.products.run(plan, x, self.copies[i % len(self.copies)], None, self.out_dtype)

    def library(self, x: Tensor) -> Launch:
        """Launches of the library's product, with the activation as a kernel of its own."""

        def launch(i: int) -> Tensor:
            values = self.copies[i % len(self.copies)].values
            if self.shape.op == "logits":
                return wide_product(x, values)
            return self.gate(F.linear(x, values), ACTIVATION) if self.bend else F.linear(x, values)

        return launch

    def check(self, launch: Launch, num_rows: int) -> None:
        """Raise if the first product is not what float64 says. Its memory holds NaN beforehand."""
        poison = torch.full((num_rows, self.shape.width), float("nan"), device=DEVICE, dtype=self.out_dtype)
        del poison  # the next tensor of its size gets its memory
        found, exact = launch(0), self.exact[:num_rows]
        if self.bend:
            exact = reference.gated_activation(exact.to(DTYPE), ACTIVATION).double()
        tolerance = 2e-4 if self.out_dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)

    def time_us(self, launch: Launch, x: Tensor, *, chained: bool) -> float:
        """Microseconds of a product in a graph of many."""
        count = max(8, min(2 * len(self.copies), 48))
        block = triton.next_power_of_2(self.shape.num_in)
        options = self.chip.launch_options

        def chain() -> None:
            for i in range(count):
                result = launch(i)
                if chained:
                    sizes = {"DIM": self.shape.num_in, "BLOCK": block, "EARLY": self.chip.early_launch}
                    _between[(x.shape[0],)](x, result, self.shape.width, **sizes, **options)

        return replay_us(chain) / count


def replay_us(body: Callable[[], None]) -> float:
    """Median time of a replay of ``body``, captured as a graph."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        body()  # whatever happens only once must not happen in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    graph.replay()
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    found = [1000 * before.elapsed_time(after) for before, after in pairwise(marks)]
    return statistics.median(found)


def candidates(shape: Shape, block_m: int, num_sms: int) -> Iterator[ProductChoice]:
    """Sizes worth trying, for ``block_m`` rows: enough programs, whole steps, shared memory that is there."""
    halves = 2 if shape.op == "gated_linear" else 1
    if block_m <= 2:
        kernel, sizes = "vector", ((8, 512, 4), (4, 1024, 4), (16, 512, 8), (4, 512, 2))
    else:
        few = ((16, 256, 2), (16, 512, 4), (64, 256, 8)) if block_m == 16 else ()
        kernel, sizes = "dot", ((16, 256, 4), (32, 128, 4), (32, 256, 4), (64, 128, 4), (128, 128, 8), *few)
        if block_m == 128:
            sizes = ((32, 64, 4), (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 8))
    smallest = 4 if kernel == "vector" else 16
    for block_n, block_k, warps in dict.fromkeys((max(n // halves, smallest), k, w) for n, k, w in sizes):
        num_tiles, kept = -(-shape.width // block_n), 0
        for split_k in (1, 2, 4, 8):
            num_programs = num_tiles * split_k
            whole = shape.num_in % (block_k * split_k) == 0
            if kept == (2 if block_m == 16 else 1) or not whole or num_programs < 0.9 * num_sms:
                continue
            if split_k > 1 and num_programs > 16 * num_sms:
                continue
            if num_tiles > 80 * num_sms:  # the head: too many too short programs
                continue
            stage_bytes = (block_m + halves * block_n) * block_k * DTYPE.itemsize
            steps = shape.num_in // (block_k * split_k)
            stages = max(2, min(5, SHARED_BYTES // 2 // stage_bytes, steps + 1))
            if kernel == "dot" and stage_bytes * stages > SHARED_BYTES:
                continue
            ahead = min(shape.num_in // split_k, 32 * 1024 // (block_n * halves))
            kept += 1
            yield ProductChoice(kernel, block_m, block_n, block_k, split_k, warps, stages, ahead)


def compile_all(bench: Bench, choices: Sequence[ProductChoice], failures: list[str]) -> list[ProductChoice]:
    """Compile all of ``choices``, and leave out those that this chip has no room for."""
    bend, matrix = bench.bend, bench.copies[0]

    def compiled(choice: ProductChoice) -> ProductChoice | None:
        try:
            plan = bench.products.plan_as(choice, matrix, bend)
            partial = None if plan.partial_shape is None else torch.float32
            tensors = (DTYPE, None, bench.out_dtype, partial, torch.int32)  # dtypes stand for tensors
            plan.kernel.warmup(DTYPE, plan.num_in, *tensors, 1, grid=plan.grid, **plan.sizes)
        except Exception as error:  # one that cannot be had must not end a measurement of minutes
            failures.append(f"{bench.shape.name} {choice}: {error!r:.300}")
            return None
        return choice

    with ThreadPoolExecutor(16) as pool:
        return [choice for choice in pool.map(compiled, choices) if choice is not None]


@dataclass
class Line:
    """The fastest way for one shape and number of rows."""

    key: ProductKey
    name: str
    library_us: dict[bool, float]  # by chained
    ours_us: dict[bool, float]
    best: ProductChoice
    ranking: list[ProductChoice] = field(default_factory=list)

    @property
    def chosen(self) -> ProductChoice:
        return self.best if self.ours_us[True] < MARGIN * self.library_us[True] else LIBRARY


def tune(bench: Bench, num_rows: int, choices: Sequence[ProductChoice], failures: list[str]) -> Line:
    """Time ``choices``, the best also without fetching ahead, and the library."""
    x, shape = bench.x[:num_rows].clone(), bench.shape
    timed: list[tuple[float, int, ProductChoice]] = []

    def consider(choice: ProductChoice) -> None:
        try:
            launch = bench.ours(choice, x)
            bench.check(launch, num_rows)
        except triton.runtime.errors.OutOfResources:
            return
        except AssertionError as error:
            failures.append(f"{shape.name} {num_rows} rows {choice}: {error!r:.300}")
            return
        timed.append((bench.time_us(launch, x, chained=True), len(timed), choice))

    for choice in choices:
        consider(choice)
    for choice in [choice for _, _, choice in sorted(timed)[:1]]:
        consider(replace(choice, ahead=0))
    timed.sort()
    best, library = timed[0][2], bench.library(x)
    bench.check(library, num_rows)
    library_us = {chained: bench.time_us(library, x, chained=chained) for chained in (False, True)}
    ours_us = {False: bench.time_us(bench.ours(best, x), x, chained=False), True: timed[0][0]}
    key = ProductKey(shape.op, str(DTYPE).removeprefix("torch."), shape.num_out, shape.num_in, num_rows)
    return Line(key, shape.name, library_us, ours_us, best, [choice for _, _, choice in timed])


def tune_shape(bench: Bench, rows: Sequence[int], failures: list[str]) -> list[Line]:
    """All numbers of rows, from many to few: what 16 rows like best is what fewer choose from."""
    lines: list[Line] = []
    shortlist: list[ProductChoice] = []
    sizes = {n for n in rows if n in (1, 2)} | {max(16, n) for n in rows}
    by_size = {m: list(candidates(bench.shape, m, bench.chip.num_sms)) for m in sorted(sizes)}
    compiled = compile_all(bench, [choice for found in by_size.values() for choice in found], failures)
    for num_rows in sorted(rows, reverse=True):
        block_m = max(16, num_rows)
        choices = [choice for choice in compiled if choice.block_m == block_m]
        if num_rows < 16 and shortlist:
            choices = [*shortlist, *(choice for choice in compiled if choice.block_m == num_rows)]
        line = tune(bench, num_rows, choices, failures)
        if num_rows <= 16 and not shortlist:
            shortlist = [choice for choice in line.ranking if choice.kernel == "dot"][:SHORTLIST]
        lines.append(line)
    return lines[::-1]


def fixed_lines(bench: Bench, rows: Sequence[int], failures: list[str]) -> list[str]:
    """The tiles of the batch-invariant mode, beside the library."""
    tiles, shape, lines = FixedTiles(bench.chip, bench.gate), bench.shape, []
    most = torch.randn(max(rows), shape.num_in, device=DEVICE, dtype=DTYPE)
    first: Tensor | None = None
    for num_rows in rows:
        x = most[:num_rows].clone()
        chosen = tile_for(num_rows, shape.num_out, DTYPE, gated=bool(bench.bend), num_sms=bench.chip.num_sms)
        at, times = TILES.index(chosen), dict[Tile, float]()
        for tile in TILES[max(0, at - 1) : at + 2]:
            if bench.bend and tile.block_n < 32:
                continue

            def launch(i: int, x: Tensor = x, tile: Tile = tile) -> Tensor:
                return tiles.multiply_in(tile, x, bench.copies[i % len(bench.copies)], None, bench.bend)

            found = launch(0)[:1].clone()
            first = found if first is None else first
            if not torch.equal(found, first):
                failures.append(f"{shape.name}: a row's bits change in {tile} among {num_rows} rows")
            times[tile] = bench.time_us(launch, x, chained=False)
        library_us, chosen_us = bench.time_us(bench.library(x), x, chained=False), times[chosen]
        tflops = 2 * num_rows * shape.num_out * shape.num_in / chosen_us / 1e6
        by_tile = "  ".join(f"{tile.block_m}x{tile.block_n} {us:.1f}" for tile, us in times.items())
        share = f"{library_us:9.1f} {chosen_us:9.1f} {100 * library_us / chosen_us:5.0f} % {tflops:8.1f}"
        lines.append(f"{shape.name:10} {num_rows:6} {share}  {chosen.block_m}x{chosen.block_n} of {by_tile}")
    return lines


def product_line(line: Line) -> str:
    """A line of the first table."""
    weights_bytes, c = line.key.num_out * line.key.num_in * DTYPE.itemsize, line.best
    ours, library = line.ours_us, line.library_us
    sizes = f"{c.kernel} {c.block_m}x{c.block_n}x{c.block_k} "
    sizes += f"split {c.split_k} warps {c.warps} stages {c.stages} ahead {c.ahead}"
    mark = " " if line.chosen is LIBRARY else "*"
    alone = f"{library[False]:8.1f} {ours[False]:8.1f} {weights_bytes / ours[False] / 1e3:7.0f}"
    return f"{line.name:10} {line.key.num_rows:4} {alone}  {library[True]:8.1f} {ours[True]:8.1f} {mark} {sizes}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="table of choices to write; what it has of other shapes and rows stays")
    parser.add_argument("--shapes", default="A,B", help='models or single shapes, as in "A,B down"')
    parser.add_argument("--rows", default=",".join(map(str, ROW_BUCKETS)))
    parser.add_argument("--fixed-rows", default="1,64,256,2048,8192", help="empty: leave the fixed tiles out")
    options = parser.parse_args(arguments)
    names, rows = options.shapes.split(","), [int(n) for n in options.rows.split(",")]
    fixed_rows = [int(n) for n in options.fixed_rows.split(",") if n]
    chip, begin = this_chip(DEVICE), time.monotonic()
    lines: list[Line] = []
    fixed: list[str] = []
    failures: list[str] = []
    for shape in (shape for model in MODELS.values() for shape in model if shape.name in names or shape.name[0] in names):
        bench = Bench.of(chip, shape)
        lines += tune_shape(bench, rows, failures)
        if fixed_rows:
            fixed += fixed_lines(bench, fixed_rows if shape.op != "logits" else [n for n in fixed_rows if n <= 256], failures)
        del bench
        torch.cuda.empty_cache()
        print(f"{shape.name} done at {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if options.out:
            before = read_choices(options.out).products if options.out.is_file() else {}
            write_choices(options.out, ChoiceTable(chip.name, before | {line.key: line.chosen for line in lines}))
    print(f"{chip.name}, {str(DTYPE).removeprefix('torch.')}; microseconds; * ours is chosen")
    print("shape      rows  library     ours    GB/s  lib. ch.  our ch.   best of ours")
    print("\n".join(map(product_line, lines)))
    if fixed:
        print("\nfixed tiles; * chosen\nshape        rows   library     fixed   share  TFLOP/s  microseconds by tile")
        print("\n".join(fixed))
    if failures:
        sys.exit("\n".join(["", f"{len(failures)} FAILURES", *failures[:20]]))


if __name__ == "__main__":
    main()
