"""The attention kernels against the definition, over a paged cache that is NaN wherever no token was written."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_batch import BLOCK_SIZE, SCALE, SMALL, Batch, batch, check, dtypes

from minivllm.kernels.triton.attention import PagedAttention
from minivllm.kernels.triton.attention_plan import Planner
from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shape, Shapes, Sizes, Step, usual_shapes
from minivllm.kernels.triton.chip import Chip, this_chip

# (tokens cached before, tokens of the step)
MIXED = [(0, 1), (37, 1), (0, 40), (15, 1), (0, 0), (100, 3), (70, 23), (255, 1)]
DECODES = [(0, 1), (63, 1), (300, 1), (31, 1), (32, 1)]


def attend(chip: Chip, sizes: Sizes, shapes: Shapes, given: Batch, window: int | None = None, single: bool = False) -> Tensor:
    kernels = PagedAttention(chip, sizes, shapes, given.q.device)
    planner = Planner(chip, kernels.tiling, sizes.num_kv_heads, (9, window), given.q.device)
    parts = planner.plan(given.query_starts, given.context_lens)
    step = Step(parts, given.block_tables, given.rows, given.context_lens, single)
    out = torch.full_like(given.q, torch.nan)
    asked = SEES_ALL if window is None else window
    for _ in range(2):  # the second finds the workspace as the first left it
        if not shapes.invariant:
            kernels.few(step, given.q, out, given.caches, SCALE, asked)
        if not single:
            kernels.many(step, given.q, out, given.caches, SCALE, asked)
    return out


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1), (6, 2)])
def test_mixed_rows(triton_device: torch.device, heads: tuple[int, int], window: int | None) -> None:
    chip = this_chip(triton_device)
    for dtype in dtypes(triton_device):
        sizes = Sizes(*heads, 64, dtype)
        given = batch(MIXED, sizes, triton_device)
        check(attend(chip, sizes, SMALL, given, window), given.expected(window, sizes))


@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_contexts_cut_anywhere(triton_device: torch.device, num_sms: int) -> None:
    """From one program for all rows to forty, where every context is cut into several parts and some programs get none."""
    chip = replace(this_chip(triton_device), num_sms=num_sms)
    shapes = replace(SMALL, few=Shape(16, 128 if num_sms == 3 else 16, 4, 3))
    for dtype in dtypes(triton_device):
        sizes = Sizes(4, 2, 64, dtype)
        given = batch(DECODES, sizes, triton_device)
        check(attend(chip, sizes, shapes, given, single=True), given.expected(None, sizes))
        check(attend(chip, sizes, shapes, given, 40, single=True), given.expected(40, sizes))


def test_more_parts_than_are_joined_at_once(triton_device: torch.device) -> None:
    chip, sizes = replace(this_chip(triton_device), num_sms=64), Sizes(16, 1, 128, torch.float32)
    shapes = replace(SMALL, few=Shape(16, 16, 4, 2))
    kernels = PagedAttention(chip, sizes, shapes, triton_device)
    kernels.tiling = replace(kernels.tiling, least_tiles=1)
    given = batch([(380, 1)], sizes, triton_device)
    check(attend(chip, sizes, shapes, given, single=True), given.expected(None, sizes))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(triton_device: torch.device, head_dim: int) -> None:
    chip = this_chip(triton_device)
    for dtype in dtypes(triton_device):
        sizes = Sizes(4, 2, head_dim, dtype)
        given = batch([(0, 33), (130, 1), (20, 9)], sizes, triton_device)
        for invariant in (False, True):
            check(attend(chip, sizes, usual_shapes(sizes, invariant), given), given.expected(None, sizes))


def test_soft_cap(triton_device: torch.device) -> None:
    sizes = Sizes(4, 2, 64, torch.float32, soft_cap=2.0)
    given = batch([(0, 20), (90, 1)], sizes, triton_device)
    check(attend(this_chip(triton_device), sizes, SMALL, given), given.expected(None, sizes))


def test_scores_far_apart(triton_device: torch.device) -> None:
    """The highest score rises from tile to tile by more than a float's exponent holds, and falls."""
    sizes = Sizes(4, 2, 64, torch.float32)
    for sign in (1.0, -1.0):
        given = batch([(150, 1), (100, 40)], sizes, triton_device)
        given.q.fill_(1.0)
        for i, k in enumerate(given.keys):
            k.copy_(torch.linspace(-sign, sign, len(k), device=k.device)[:, None, None].expand_as(k) * 20)
            at = torch.arange(len(k), device=k.device)
            table = given.block_tables[int(given.rows[i])]
            given.caches[0][table[at // BLOCK_SIZE].long(), :, at % BLOCK_SIZE] = k
        check(attend(this_chip(triton_device), sizes, SMALL, given), given.expected(None, sizes))


@pytest.mark.parametrize("window", [None, 50])
def test_invariant_bits(triton_device: torch.device, window: int | None) -> None:
    """A query's bits are the same alone, in a chunk of any length, and in any company."""
    chip = this_chip(triton_device)
    for dtype in dtypes(triton_device):
        sizes = Sizes(4, 2, 64, dtype)
        shapes = usual_shapes(sizes, invariant=True)
        given = batch([(0, 140), (40, 30)], sizes, triton_device)
        together = attend(chip, sizes, shapes, given, window)
        check(together, given.expected(window, sizes))
        for first, last in ((0, 37), (37, 38), (100, 140), (139, 140)):
            alone = replace(
                given, q=given.q[first:last], rows=given.rows[:1],
                query_starts=torch.tensor([0, last - first], dtype=torch.int32, device=triton_device),
                context_lens=torch.tensor([last], dtype=torch.int32, device=triton_device),
            )  # fmt: skip
            assert torch.equal(attend(chip, sizes, shapes, alone, window), together[first:last])


def test_a_plan_leaves_out_what_a_library_takes(triton_device: torch.device) -> None:
    chip, sizes = this_chip(triton_device), Sizes(4, 2, 64, torch.float32)
    kernels = PagedAttention(chip, sizes, SMALL, triton_device)
    starts = torch.tensor([0, 70, 134, 198, 199], dtype=torch.int32, device=triton_device)
    contexts = torch.tensor([70, 128, 100, 33], dtype=torch.int32, device=triton_device)
    parts = Planner(chip, kernels.tiling, 2, (None, 20), triton_device).plan(starts, contexts, long_grain=32)
    assert parts[SEES_ALL].first_query.tolist() == [64, 134, 134, 198]
    assert parts[SEES_ALL].num_queries.tolist() == [6, 0, 64, 1]  # the third has 36 tokens before it: no whole grains
    assert parts[SEES_ALL].item_starts.tolist() == [0, 0, 0, 4, 4]
    assert parts[SEES_ALL].share_starts.tolist() == [0, 3, 3, 3, 5]
    assert parts[20].num_queries.tolist() == [70, 64, 64, 1]
    assert parts[20].share_starts.tolist() == [0, 0, 0, 0, 2]
