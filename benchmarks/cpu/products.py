"""Matrix products alone: the compiled kernels beside torch's, against what the CPU can do at most.

    python -m benchmarks.cpu.products [--rows 1,8,32] [--shapes 768x2304,gpt2] [--kinds float32,int8] [--threads 2]

A shape is num_in x num_out, or the name of a model: all its matrices, one product each, as in a step. Weights are cold: copies
of a matrix take turns, more bytes together than caches hold (a small model's weights stay in its caches; that is its nature).
Ours and torch take turns, and each line first waits for the machine to be quiet (at most ``--quiet`` seconds). Shown is the
fastest tenth of the calls, for neighbours on a shared machine only ever add time. "Of peak" is the larger of two shares: of the
peak of multiplications in registers (``peaks.cpp``), and of the peak of reading memory. int8 has no plain counterpart in
torch. A table, then one line of JSON.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from shutil import which

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu.machine import await_quiet, describe_machine
from minivllm.kernels import reference
from minivllm.kernels.cpu.build import COMPILERS, find_or_build
from minivllm.kernels.cpu.library import NativeLibrary
from minivllm.kernels.cpu.products import Products

HERE = Path(__file__).resolve().parent
COLD_BYTES = 256 * 2**20
TURNS, FALL_ASLEEP_S = 8, 0.005
GPT2 = ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 12 + ((768, 50257),)
STORIES = ((384, 640), (384, 384), (384, 1152), (576, 384)) * 8 + ((384, 4096),)
MODELS: Mapping[str, Sequence[tuple[int, int]]] = {"gpt2": GPT2, "stories": STORIES}
SHAPES = "768x2304,768x768,768x3072,3072x768,768x50257,384x384,384x640,gpt2,stories"
KINDS: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Product = Callable[[Mapping[int, Tensor]], list[Tensor]]  # of the inputs, by their num_in


@dataclass(frozen=True)
class Peaks:
    """Operations per second by kind of weights, and bytes per second."""

    operations: Mapping[str, float]
    read: float


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    kind: str
    shape: str
    rows: int
    ours_us: float
    torch_us: float | None
    operations_per_s: float
    bytes_per_s: float
    of_peak: float


def measure_peaks(num_threads: int) -> Peaks:
    """Build ``peaks.cpp`` and run it."""
    compiler = next(path for name in COMPILERS if (path := which(name)))
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peaks"
        flags = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-Wno-psabi")
        subprocess.run([compiler, *flags, str(HERE / "peaks.cpp"), "-o", program], check=True)
        printed = subprocess.run([program, str(num_threads)], check=True, capture_output=True, text=True).stdout
    found = json.loads(printed)
    read = found.pop("read")
    return Peaks({kind: found.get(kind) or found["float32"] for kind in (*KINDS, "int8")}, read)


def sizes_of(shape: str) -> Sequence[tuple[int, int]]:
    """(num_in, num_out) of each matrix of a model, or of one."""
    num_in, _, num_out = shape.partition("x")
    return MODELS[shape] if shape in MODELS else [(int(num_in), int(num_out))]


def num_bytes(kind: str) -> int:
    """Of a weight."""
    return KINDS[kind].itemsize if kind in KINDS else 1


def contenders(kind: str, sizes: Sequence[tuple[int, int]], products: Products) -> list[list[Product]]:
    """Ours, and torch's where there is one: each a list of copies, and a copy computes the products of all ``sizes``."""
    dtype = KINDS.get(kind, torch.bfloat16)
    copies = -(-COLD_BYTES // (num_bytes(kind) * sizes[0][0] * sizes[0][1])) if len(sizes) == 1 else 1
    ours: list[Product] = []
    theirs: list[Product] = []
    for _ in range(copies):
        weights = [torch.randn(num_out, num_in).mul_(0.02) for num_in, num_out in sizes]
        plain = [reference.quantize_rows(w) if kind == "int8" else (w.to(dtype), None) for w in weights]
        packed = [products.pack(values, scales) for values, scales in plain]
        ours.append(lambda x, packed=packed: [products.linear(x[m.num_in], m, None) for m in packed])
        if kind != "int8":
            theirs.append(lambda x, plain=plain: [F.linear(x[w.shape[1]], w) for w, _ in plain])
    return [ours, theirs] if theirs else [ours]


def fastest_tenth_s(candidates: Sequence[Sequence[Product]], x: Mapping[int, Tensor], seconds: float) -> list[float]:
    """Seconds of a call of each contender. They take turns, and after each the threads of its pool have time to fall asleep."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(TURNS):
        for copies, found in zip(candidates, times, strict=True):
            until = time.perf_counter() + seconds / TURNS
            for copy in cycle(copies):
                began = time.perf_counter()
                copy(x)
                ended = time.perf_counter()
                found.append(ended - began)
                if ended > until:
                    break
            time.sleep(FALL_ASLEEP_S)
    return [sorted(found)[len(found) // 10] for found in times]


def figure(kind: str, shape: str, num_rows: int, found_s: Sequence[float], peaks: Peaks) -> Figure:
    """A line of the table from the times of its contenders."""
    ours_s, *torch_s = found_s
    weights = sum(a * b for a, b in sizes_of(shape))
    operations, read = 2 * num_rows * weights / ours_s, weights * num_bytes(kind) / ours_s
    share = max(operations / peaks.operations[kind], read / peaks.read)
    return Figure(kind, shape, num_rows, 1e6 * ours_s, 1e6 * torch_s[0] if torch_s else None, operations, read, share)


def show(f: Figure) -> None:
    """Print a line of the table."""
    theirs = f"{f.torch_us:>10.1f}{f.torch_us / f.ours_us:>7.2f}" if f.torch_us else " " * 17
    speed = f"{f.operations_per_s / 1e9:>8.1f}{f.bytes_per_s / 1e9:>7.1f}{f.of_peak:>9.0%}"
    print(f"{f.kind:<10}{f.shape:<12}{f.rows:>5}{f.ours_us:>10.1f}{theirs}{speed}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,1024")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--kinds", default="float32,bfloat16,float16,int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="for each contender of a line")
    parser.add_argument("--quiet", type=float, default=0.0, help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = NativeLibrary(find_or_build())
    library.set_threads(args.threads)
    await_quiet(args.quiet)
    products, peaks = Products(library), measure_peaks(args.threads)
    print(", ".join(f"{kind} {peak / 1e9:.0f} G operations/s" for kind, peak in peaks.operations.items()), end="")
    print(f", read {peaks.read / 1e9:.1f} GB/s; {args.threads} threads")
    print(f"{'kind':<10}{'shape':<12}{'rows':>5}{'us':>10}{'torch us':>10}{'ratio':>7}{'Gop/s':>8}{'GB/s':>7}{'of peak':>9}")
    figures = []
    for kind, shape in product(args.kinds.split(","), args.shapes.split(",")):
        candidates = contenders(kind, sizes_of(shape), products)
        for num_rows in map(int, args.rows.split(",")):
            dtype = KINDS.get(kind, torch.bfloat16)
            x = {num_in: torch.randn(num_rows, num_in).to(dtype) for num_in, _ in sizes_of(shape)}
            await_quiet(args.quiet)
            figures.append(figure(kind, shape, num_rows, fastest_tenth_s(candidates, x, args.seconds), peaks))
            show(figures[-1])
    facts = {"machine": describe_machine(), "threads": args.threads, "peaks": asdict(peaks)}
    print(json.dumps({**facts, "figures": [asdict(f) for f in figures]}))


if __name__ == "__main__":
    main()
