"""Decodes behind one common beginning: each row for itself, and with the beginning read once for all of them.

    python -m benchmarks.gpu.shared_prefix --out shared.json [--models A,B] [--shapes all]

For each step: microseconds of a layer's attention when every row reads all of its context, and with the pass over the common
beginning (``kernels/triton/shared_prefix.py``) cut in the usual way, or with ``--shapes all`` in several. Results are checked
against the definition in float32 first. Times are of replays of a CUDA graph; one cache serves all, since the beginning is read
from the L2 cache either way when it fits. The exit status is 1 if anything computed wrong numbers.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.attention import BLOCK_SIZE, DEVICE, DTYPE, MODELS, SCALE, Bed, expected, graph_us, make_bed, wrong
from minivllm.attention.base import SharedShape
from minivllm.kernels.triton.attention import PagedAttention
from minivllm.kernels.triton.attention_plan import Planner
from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shape, Shapes, SharedItems, Sizes, Step, usual_shapes
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.shared_prefix import PrefixWalk
from minivllm.runner.seating import Seater, most_items
from minivllm.types import SharedPrefix as Group

STEPS = [  # rows, tokens that all begin with, tokens of each row's own
    (256, 2048, 96), (64, 2048, 96), (16, 2048, 96), (8, 2048, 96), (4, 2048, 96), (8, 30720, 96),
    (256, 512, 256), (32, 512, 256), (16, 512, 256), (8, 512, 256),
]  # fmt: skip
SHAPES = [Shape(128, 64, 8, 3), Shape(128, 64, 4, 3), Shape(64, 64, 4, 3), Shape(64, 128, 4, 2), Shape(128, 128, 8, 2)]


def begin_alike(bed: Bed, num_tokens: int) -> Group:
    """All rows begin with the blocks of the first."""
    bed.tables[:, : num_tokens // BLOCK_SIZE] = bed.tables[0, : num_tokens // BLOCK_SIZE].clone()
    return Group(tuple(range(len(bed.rows))), num_tokens // BLOCK_SIZE)


def launcher(sizes: Sizes, shapes: Shapes, bed: Bed, group: Group | None, out: torch.Tensor) -> Callable[[], None]:
    """What attends over one layer; the plan of the step is made here, once, as for all layers of a model."""
    chip, num_rows = this_chip(DEVICE), len(bed.rows)
    kernels, prefix = PagedAttention(chip, sizes, shapes, DEVICE), PrefixWalk(chip, sizes, shapes)
    tiling, shared = kernels.tiling, None
    if group is not None:
        shape = SharedShape(tiling.shared_rows, tiling.shared_grain, 1)
        seating = Seater(shape, BLOCK_SIZE, num_rows).seat((group,), np.arange(num_rows))
        if seating is None:
            raise ValueError("nothing is shared")
        items = torch.zeros(4 + 3 * most_items(num_rows, shape), dtype=torch.int32)
        items[0] = len(seating.items)
        items[4 : 4 + seating.items.size] = torch.from_numpy(seating.items.reshape(-1))
        shared = prefix.prepare(SharedItems(torch.from_numpy(seating.seats).to(DEVICE), items.to(DEVICE)))
    planner = Planner(chip, tiling, sizes.num_kv_heads, (None,), DEVICE)
    parts = planner.plan(bed.query_starts, bed.context_lens, 0, shared)
    rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    step = Step(parts, bed.tables, rows, bed.context_lens, single=True, shared=shared)

    def launch() -> None:
        if shared is not None:
            prefix.walk(step, bed.q, bed.caches[0], SCALE)
        kernels.few(step, bed.q, out, bed.caches[0], SCALE, SEES_ALL)

    return launch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every figure")
    parser.add_argument("--models", default="A,B")
    parser.add_argument("--shapes", choices=("usual", "all"), default="usual")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    failures = 0
    for model in options.models.split(","):
        sizes = MODELS[model]
        usual = usual_shapes(sizes, invariant=False)
        for num_rows, common, own in STEPS:
            bed = make_bed(sizes, [(common + own - 1, 1)] * num_rows)
            group = begin_alike(bed, common)
            out = torch.full_like(bed.q, torch.nan)
            alone_us = graph_us([launcher(sizes, usual, bed, None, out)], 20)
            line = f"{model} {num_rows:4} x ({common} + {own}): each for itself {alone_us:7.1f} us;"
            for shape in SHAPES if options.shapes == "all" else [usual.shared]:
                out.fill_(torch.nan)
                launch = launcher(sizes, replace(usual, shared=shape), bed, group, out)
                launch()
                error = max(wrong(out[i : i + 1], expected(bed, i)) for i in range(0, num_rows, max(1, num_rows // 7)))
                failures += error > 0.02
                us = graph_us([partial(launch)], 20)
                name = f"{shape.tile_m}x{shape.tile_n} w{shape.num_warps} s{shape.num_stages}"
                records.append({"model": model, "rows": num_rows, "common": common, "own": own, "shape": name, "us": us})
                records[-1] |= {"alone_us": alone_us, "error": error}
                line += f"  {name} {us:6.1f}{'' if error <= 0.02 else f' WRONG {error:.3f}'}"
            print(line, flush=True)
            del bed
    options.out.write_text(json.dumps({"chip": this_chip(DEVICE).name, "dtype": str(DTYPE), "figures": records}, indent=1))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
