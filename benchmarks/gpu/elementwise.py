"""Norms, activations, gathers and sampling on a GPU: checks each kernel, then its time and bandwidth beside a copy's.

    python -m benchmarks.gpu.elementwise [--out FILE.json] [--rows 1,32,256,8192] [--only PART_OF_NAME]

The shapes are those of two models (A: Qwen3-0.6B, B: Llama-3.1-8B, and GPT-2's for LayerNorm), bf16; logits are float32. Every
kernel is compared with the reference, its results' memory holding NaN before, and then timed as the median of replays of a CUDA
graph of many launches over copies of the input that take turns, so that the data comes from memory and not from the L2 cache.
At one row the time is what a launch costs in a chain. The table comes last; the exit status is 1 if a result was wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.products import replay_us
from minivllm.kernels import reference
from minivllm.kernels.triton.chip import Chip, this_chip
from minivllm.kernels.triton.cutoff import Cutoff
from minivllm.kernels.triton.elementwise import Elementwise
from minivllm.kernels.triton.sampling import Draw
from minivllm.sampling.batch import SampleBatch
from minivllm.sampling.gumbel import GumbelDraw
from minivllm.sampling.min_p import MinP
from minivllm.sampling.top_k import TopK
from minivllm.sampling.top_p import TopP
from minivllm.types import NewRow, SamplingParams

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
COLD_BYTES = 160 * 2**20  # the copies of an input, together: three times the L2 cache
MAX_COPIES = 64
MAX_LOGIT_ROWS = 256
CHECKED_ROWS = 4  # of a draw and a cutoff, against the CPU
TEMPERATURE, SEED = 0.6, 0x1234_5678_9ABC
FILTERS = {"top_k": 50, "top_p": 0.875, "min_p": 0.0625}


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    name: str
    num_rows: int
    moved_bytes: int  # read and written by a launch, once each
    num_copies: int
    launch: Callable[[int], object]  # the i-th launch, on copy i
    check: Callable[[], None]  # raises AssertionError

    def time_us(self) -> float:
        """Microseconds of a launch in a graph of many."""
        count = max(4, min(64, 2**31 // self.moved_bytes))

        def chain() -> None:
            for i in range(count):
                self.launch(i % self.num_copies)

        return replay_us(chain) / count


def copies(num_rows: int, width: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """Random rows, as often as it takes to be out of the cache."""
    num = max(1, min(MAX_COPIES, -(-COLD_BYTES // (num_rows * width * dtype.itemsize))))
    return [torch.randn(num_rows, width, device=DEVICE, dtype=dtype) for _ in range(num)]


def listed(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results of an op that has one or two."""
    return result if isinstance(result, tuple) else (result,)


Op = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def simple(name: str, xs: list[Tensor], ours: Op, meant: Op, moved: int) -> Case:
    """A kernel of rows against the reference: one unit in the last place of bf16, two after a product of rounded numbers."""

    def check() -> None:
        expected = listed(meant(xs[0]))
        poison = [torch.full_like(like, float("nan")) for like in expected]
        del poison  # the next tensors of their sizes get their memory
        units = 2.0**-6 if "gated" in name else 2.0**-7
        for one, other in zip(listed(ours(xs[0])), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=units, atol=1e-5)

    return Case(name, len(xs[0]), moved, len(xs), lambda i: ours(xs[i]), check)


def elementwise_cases(kernels: Elementwise, rows: int) -> Iterator[Case]:
    """The ops of ``Elementwise`` at ``rows`` rows."""
    for model, dim in (("A", 1024), ("B", 4096)):
        weight, xs = torch.randn(dim, device=DEVICE, dtype=DTYPE), copies(rows, dim)
        residual, each = torch.randn_like(xs[0]), rows * dim * DTYPE.itemsize
        pair = (kernels, reference)
        norm = [lambda x, t=t, w=weight: t.rms_norm(x, w, 1e-6) for t in pair]
        yield simple(f"rms_norm {model} {dim}", xs, *norm, 2 * each)
        added = [lambda x, t=t, w=weight, r=residual: t.add_rms_norm(x, r, w, 1e-6) for t in pair]
        yield simple(f"add_rms_norm {model} {dim}", xs, *added, 4 * each)
    (weight, bias), xs = torch.randn(2, 768, device=DEVICE, dtype=DTYPE), copies(rows, 768)
    residual = torch.randn_like(xs[0])
    added = [lambda x, t=t: t.add_layer_norm(x, residual, weight, bias, 1e-5) for t in (kernels, reference)]
    yield simple("add_layer_norm 768", xs, *added, 4 * rows * 768 * DTYPE.itemsize)
    yield from head_norm(kernels, rows)
    for model, dim in (("A", 3072), ("B", 14336)):
        xs = copies(rows, 2 * dim)
        gated = [lambda x, t=t: t.gated_activation(x, "silu") for t in (kernels, reference)]
        yield simple(f"gated silu {model} {dim}", xs, *gated, 3 * rows * dim * DTYPE.itemsize)
    xs = copies(rows, 3072)
    bent = [lambda x, t=t: t.activation(x, "gelu_new") for t in (kernels, reference)]
    yield simple("gelu_new 3072", xs, *bent, 2 * rows * 3072 * DTYPE.itemsize)
    yield from gathers(kernels, rows)


def head_norm(kernels: Elementwise, rows: int) -> Iterator[Case]:
    """The norm of 16 query heads inside a fused projection."""
    weight, xs = torch.randn(128, device=DEVICE, dtype=DTYPE), copies(rows, 4096)
    views = [x[:, :2048].unflatten(1, (16, 128)) for x in xs]
    norm = [lambda x, t=t: t.rms_norm(x, weight, 1e-6) for t in (kernels, reference)]
    yield simple("rms_norm A 16 x 128 of 4096", views, *norm, 2 * rows * 2048 * DTYPE.itemsize)


def gathers(kernels: Elementwise, rows: int) -> Iterator[Case]:
    """Rows of a vocabulary's table."""
    for model, vocab, dim in (("A", 151936, 1024), ("B", 128256, 4096)):
        table = torch.randn(vocab, dim, device=DEVICE, dtype=DTYPE)
        ids = [torch.randint(vocab, (rows,), device=DEVICE) for _ in range(MAX_COPIES)]
        gather = [lambda x, t=t, table=table: t.embedding(x, table) for t in (kernels, reference)]
        yield simple(f"embedding {model} {dim}", ids, *gather, 2 * rows * dim * DTYPE.itemsize)


def sampling_cases(chip: Chip, rows: int) -> Iterator[Case]:
    """The draw, and the search for what top_k, top_p and min_p keep."""
    for model, vocab in (("A", 151936), ("B", 128256)):
        if rows <= MAX_LOGIT_ROWS:
            logits = [x.mul_(2.0) for x in copies(rows, vocab, torch.float32)]
            yield from draws(Draw(chip), f"{model} {vocab}", logits)
            for names in (("min_p",), ("top_k",), ("top_p",), ("top_k", "top_p")):
                yield cutoffs(Cutoff(chip), f"{model} {vocab}", logits, names)


def draws(draw: Draw, shape: str, logits: list[Tensor]) -> Iterator[Case]:
    """The most likely tokens, and tokens drawn at a temperature."""
    rows, (wishes, first) = len(logits[0]), (wishes_of(len(logits[0])), logits[0])
    sizes = (rows, first.nbytes, len(logits))
    yield Case(
        f"choose {shape}", *sizes, lambda i: draw.choose(logits[i]),
        lambda: same_tokens(draw.choose(first), reference.choose(first)),
    )  # fmt: skip
    yield Case(
        f"draw {shape}", *sizes, lambda i: draw.draw(logits[i], wishes),
        lambda: check_draw(draw.draw(first, wishes), first),
    )  # fmt: skip


def cutoffs(cutoff: Cutoff, shape: str, logits: list[Tensor], names: tuple[str, ...]) -> Case:
    """A search; its bytes are those of all its readings."""
    rows = len(logits[0])
    temperatures = torch.full((rows,), TEMPERATURE, device=DEVICE)
    values: list[Tensor | None] = [None, None, None]
    for at, (name, value) in enumerate(FILTERS.items()):
        if name in names:
            values[at] = torch.full((rows,), value, device=DEVICE, dtype=torch.int32 if name == "top_k" else torch.float32)
    readings = 1 + 8 * len(set(names) - {"min_p"})

    def find(i: int) -> Tensor:
        return cutoff.lowest_kept(logits[i], temperatures, *values)

    moved = readings * logits[0].nbytes
    return Case(
        f"cutoff {'+'.join(names)} {shape}", rows, moved, len(logits), find, lambda: check_cutoff(find(0), logits[0], names)
    )


def wishes_of(rows: int) -> Tensor:
    """Draws at position = 100 + row from one seed."""
    words = np.zeros((rows, 6), dtype=np.uint32)
    words[:, 0], words[:, 1] = np.arange(rows), 100 + np.arange(rows)
    words[:, 2] = np.float32(TEMPERATURE).view(np.uint32)
    words[:, 3:5] = SEED & 0xFFFFFFFF, SEED >> 32
    return torch.from_numpy(words.view(np.int32)).to(DEVICE)


def same_tokens(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Ids and flags are those expected."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), f"{(one != other).sum()} rows differ"


def host_rows(num_rows: int, sampling: SamplingParams, states: Sequence[object]) -> SampleBatch:
    """Give the first rows to the CPU's features, as ``wishes_of`` has them."""
    for row in range(num_rows):
        new = NewRow(row, row, (1,), 1, sampling, SEED, 0, 0, ((1,),), 0)
        for state in states:
            state.set_row(new)  # type: ignore[attr-defined]
    rows = np.arange(num_rows)
    return SampleBatch(rows, 100 + rows, torch.zeros((num_rows, 1), dtype=torch.int32))


def check_draw(found: tuple[Tensor, Tensor], logits: Tensor) -> None:
    """The CPU's tokens, in all but at most one row (two scores may be too close to tell)."""
    ids, finite = found
    num = min(CHECKED_ROWS, len(logits))
    gumbel = GumbelDraw(num)
    batch = host_rows(num, SamplingParams(temperature=TEMPERATURE), [gumbel])
    expected = gumbel.draw(logits[:num].cpu() / np.float32(TEMPERATURE), batch, filtered=False)
    assert bool(finite.all()), "finite logits were taken for others"
    assert bool(((ids >= 0) & (ids < logits.shape[1])).all()), "an id beyond the vocabulary"
    assert int((ids[:num].cpu() != expected).sum()) <= 1, f"drew {ids[:num].tolist()}, not {expected.tolist()}"


def check_cutoff(lowest: Tensor, logits: Tensor, names: tuple[str, ...]) -> None:
    """As many tokens kept as on the CPU, but for one where p lies on the edge between two."""
    num, vocab = min(CHECKED_ROWS, len(logits)), logits.shape[1]
    sampling = SamplingParams(temperature=TEMPERATURE, **{name: FILTERS[name] for name in names})  # type: ignore[arg-type]
    features = (MinP(num), TopK(num, vocab), TopP(num))
    batch = host_rows(num, sampling, features)
    scaled = logits[:num].cpu() / np.float32(TEMPERATURE)
    found = (scaled >= lowest[:num].cpu()[:, None]).sum(-1)
    for feature in features:
        if feature.active(batch):
            feature.apply(scaled, batch)
    kept = (scaled > -torch.inf).sum(-1)
    assert int((found - kept).abs().max()) <= 1, f"kept {found.tolist()}, not {kept.tolist()}"


def copy_rate() -> float:
    """GB/s of a copy in memory, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / replay_us(copy) / 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--rows", default="1,32,256,8192", help="numbers of rows")
    parser.add_argument("--only", default="", help="only kernels with this in their name")
    asked = parser.parse_args(arguments)
    chip = this_chip(DEVICE)
    kernels, rate = Elementwise(chip), copy_rate()
    lines: list[str] = []
    records: list[dict[str, object]] = []
    failures: list[str] = []
    for rows in map(int, asked.rows.split(",")):
        for group in (elementwise_cases(kernels, rows), sampling_cases(chip, rows)):
            cases = [case for case in group if asked.only in case.name]
            with ThreadPoolExecutor(16) as pool:  # compiles them at once
                list(pool.map(lambda case: case.launch(0), cases))
            torch.cuda.synchronize()
            for case in cases:
                try:
                    case.check()
                except AssertionError as error:
                    failures.append(f"{case.name}, {rows} rows: {error}")
                microseconds = case.time_us()
                gigabytes = case.moved_bytes / microseconds / 1e3
                lines.append(f"{case.name:32} {rows:6} {microseconds:9.2f} {gigabytes:8.0f} {100 * gigabytes / rate:6.1f} %")
                record = {"kernel": case.name, "rows": rows, "us": microseconds, "gb_per_s": gigabytes}
                records.append(record | {"share_of_copy": gigabytes / rate})
            del cases
    if asked.out is not None:
        asked.out.write_text(json.dumps({"chip": chip.name, "copy_gb_per_s": rate, "kernels": records}, indent=1))
    print(f"{chip.name}, a copy in memory: {rate:.0f} GB/s read and written")
    print(f"{'kernel':32} {'rows':>6} {'us':>9} {'GB/s':>8} {'of copy':>8}")
    print("\n".join(lines))
    if failures:
        print("\nWRONG:\n" + "\n".join(failures))
        sys.exit(1)


if __name__ == "__main__":
    main()
