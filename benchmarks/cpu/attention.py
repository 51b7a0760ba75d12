"""Attention alone: the compiled kernel over the paged cache beside torch's.

    python -m benchmarks.cpu.attention [--decode 8x512,1x2048] [--prompts 128] [--heads 12/12x64] [--kinds bfloat16]

Heads are query heads / KV heads x head_dim. A decode step is rows x context: each row's blocks lie scattered over the pool, and
pools of as many layers take turns as caches cannot hold, for a step never finds a layer's cache where the step before left it.
Beside ours stands torch's backend, which gathers each row's blocks. A prompt is computed in one step, writing it to the cache
included; beside ours stands torch's ``scaled_dot_product_attention``, causal, over contiguous K and V of the prompt alone: less
work than ours. The two take turns, and each line first waits for the machine to be quiet (at most ``--quiet`` seconds). Shown
is the fastest tenth of the calls, for neighbours on a shared machine only ever add time; one layer each. GB/s are of reading K
and V once, Gop/s of the multiplications and additions that no mask hides. A table, then one line of JSON.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.cpu.machine import await_quiet, describe_machine
from minivllm.attention.base import AttentionBackend, AttnLayer, AttnMeta, AttnNeed, KVLayer
from minivllm.attention.native import NativeAttention
from minivllm.attention.torch_sdpa import TorchAttention
from minivllm.kernels.cpu.build import find_or_build
from minivllm.kernels.cpu.library import NativeLibrary
from minivllm.kernels.ops import native_ops, reference_ops

COLD_BYTES, BLOCK_SIZE = 256 * 2**20, 16
TURNS, FALL_ASLEEP_S = 8, 0.005
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Work:
    """One line's work."""

    rows: int
    context: int
    queries: int  # of each row: 1, or the context
    heads: tuple[int, int, int]  # num_heads, num_kv_heads, head_dim
    kind: str

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.rows} x {self.context}" if self.queries == 1 else f"prompt {self.context}"

    @property
    def layer_bytes(self) -> int:
        """K and V of all rows."""
        return 2 * self.rows * self.context * self.heads[1] * self.heads[2] * KINDS[self.kind].itemsize

    @property
    def operations(self) -> int:
        """Multiplications and additions of scores and values."""
        pairs = self.context if self.queries == 1 else self.context * (self.context + 1) // 2
        return 4 * self.rows * pairs * self.heads[0] * self.heads[2]

    def need(self) -> AttnNeed:
        """What a backend is asked for."""
        dtype = KINDS[self.kind]
        return AttnNeed(*self.heads, (None,), BLOCK_SIZE, dtype, dtype, torch.device("cpu"), False)


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    work: Work
    ours_us: float
    torch_us: float
    bytes_per_s: float
    operations_per_s: float


def step_of(work: Work) -> tuple[AttnMeta, int]:
    """The step, each row's blocks scattered, and how many blocks the pool needs."""
    per_row = -(-work.context // BLOCK_SIZE)
    blocks = list(range(1, work.rows * per_row + 1))
    random.Random(0).shuffle(blocks)
    table = np.array(blocks, dtype=np.int32).reshape(work.rows, per_row)
    at = np.arange(work.context - work.queries, work.context)
    slots = table[:, at // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + at % BLOCK_SIZE
    starts, contexts = np.arange(work.rows + 1) * work.queries, np.full(work.rows, work.context)
    return AttnMeta(starts, contexts, np.arange(work.rows), table, BLOCK_SIZE, torch.from_numpy(slots.reshape(-1))), len(
        blocks
    ) + 1


def over_pools(backend: AttentionBackend, work: Work) -> Callable[[], None]:
    """A call that computes one layer; the pools of several take turns."""
    meta, num_blocks = step_of(work)
    num_heads, num_kv_heads, head_dim = work.heads
    num_layers = max(2, COLD_BYTES // work.layer_bytes) if work.queries == 1 else 2
    shapes = backend.pool_shapes(num_blocks)
    caches = [KVLayer(*(torch.full(shape, 0.5, dtype=KINDS[work.kind]) for shape in shapes)) for _ in range(num_layers)]
    fused = torch.randn(len(meta.slots), num_heads + 2 * num_kv_heads, head_dim).to(KINDS[work.kind])
    plan, layer = backend.plan(meta), AttnLayer(num_heads, num_kv_heads, head_dim, head_dim**-0.5, None)

    def call() -> None:
        caches.append(caches.pop(0))
        backend.run(plan, layer, fused, None, caches[0])

    return call


def contiguous(work: Work) -> Callable[[], None]:
    """Torch's attention of one prompt."""
    num_heads, num_kv_heads, head_dim = work.heads
    q, k, v = (torch.randn(1, n, work.context, head_dim).to(KINDS[work.kind]) for n in (num_heads, num_kv_heads, num_kv_heads))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != num_kv_heads)

    return call


def fastest_tenth_us(calls: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """The tenth percentile of each call's times. They take turns; after each its threads have time to fall asleep."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for call, found in zip(calls, times, strict=True):
            call()
            until_s = time.perf_counter() + seconds / TURNS
            while not found or time.perf_counter() < until_s:
                start_s = time.perf_counter()
                call()
                found.append(1e6 * (time.perf_counter() - start_s))
            time.sleep(FALL_ASLEEP_S)
    return [sorted(found)[len(found) // 10] for found in times]


def works(args: argparse.Namespace) -> list[Work]:
    """All lines that were asked for."""
    found = []
    for kind, text in product(args.kinds.split(","), args.heads.split(",")):
        counts, _, head_dim = text.partition("x")
        num_heads, num_kv_heads = map(int, counts.split("/"))
        heads = (num_heads, num_kv_heads, int(head_dim))
        steps = [tuple(map(int, pair.split("x"))) for pair in args.decode.split(",") if pair]
        found += [Work(rows, context, 1, heads, kind) for rows, context in steps]
        found += [Work(1, length, length, heads, kind) for length in map(int, filter(None, args.prompts.split(",")))]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", default="1x256,1x2048,8x192,8x512,32x192,32x512")
    parser.add_argument("--prompts", default="128,512,2048")
    parser.add_argument("--heads", default="12/12x64,16/8x128")
    parser.add_argument("--kinds", default="float32,bfloat16,float16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="for each contender of a line")
    parser.add_argument("--quiet", type=float, default=0.0, help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = NativeLibrary(find_or_build())
    library.set_threads(args.threads)
    header = f"{'kind':<10}{'heads':<11}{'work':<12}{'us':>10}{'torch us':>10}{'ratio':>7}{'GB/s':>7}{'Gop/s':>8}"
    print(f"{header}   ({args.threads} threads)")
    figures = []
    for work in works(args):
        native = over_pools(NativeAttention(work.need(), native_ops(library)), work)
        torchs = over_pools(TorchAttention(work.need(), reference_ops()), work) if work.queries == 1 else contiguous(work)
        await_quiet(args.quiet)
        with torch.inference_mode():
            ours_us, torch_us = fastest_tenth_us((native, torchs), args.seconds)
        figures.append(Figure(work, ours_us, torch_us, 1e6 * work.layer_bytes / ours_us, 1e6 * work.operations / ours_us))
        heads = f"{work.heads[0]}/{work.heads[1]}x{work.heads[2]}"
        times = f"{ours_us:>10.1f}{torch_us:>10.1f}{torch_us / ours_us:>7.2f}"
        speed = f"{figures[-1].bytes_per_s / 1e9:>7.1f}{figures[-1].operations_per_s / 1e9:>8.1f}"
        print(f"{work.kind:<10}{heads:<11}{work.name:<12}{times}{speed}", flush=True)
    facts = {"machine": describe_machine(), "threads": args.threads}
    print(json.dumps({**facts, "figures": [asdict(f) for f in figures]}))


if __name__ == "__main__":
    main()
