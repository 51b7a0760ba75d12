"""Beginnings that decodes have in common are read once, and every row gets what it would get alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_batch import BLOCK_SIZE, SCALE, SMALL, Batch, batch, check, dtypes

from minivllm.attention.base import SharedShape
from minivllm.kernels.triton.attention import PagedAttention
from minivllm.kernels.triton.attention_plan import Planner
from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shape, Shapes, SharedItems, Sizes, Step
from minivllm.kernels.triton.chip import Chip, this_chip
from minivllm.kernels.triton.shared_prefix import PrefixWalk
from minivllm.runner.seating import Seater, Seating, most_items
from minivllm.types import SharedPrefix as Group

CONTEXTS = [(100, 1), (63, 1), (128, 1), (129, 1), (40, 1), (71, 1), (255, 1), (64, 1)]


def share(given: Batch, members: list[int], num_tokens: int) -> Group:
    """Let the rows at places ``members`` of the step begin with the blocks of the first of them."""
    first, num_blocks = members[0], num_tokens // BLOCK_SIZE
    blocks = given.block_tables[int(given.rows[first]), :num_blocks].clone()
    for i in members[1:]:
        given.block_tables[int(given.rows[i]), :num_blocks] = blocks
        for kept in (given.keys, given.values):
            kept[i][:num_tokens] = kept[first][:num_tokens]
    return Group(tuple(sorted(int(given.rows[i]) for i in members)), num_blocks)


def on_page(seating: Seating, num_rows: int, num_items: int, device: torch.device) -> SharedItems:
    seats, items = torch.full((num_rows,), -1, dtype=torch.int32), torch.zeros(4 + 3 * num_items, dtype=torch.int32)
    seats[: len(seating.seats)] = torch.from_numpy(seating.seats)
    items[0] = len(seating.items)
    items[4 : 4 + seating.items.size] = torch.from_numpy(seating.items.reshape(-1))
    return SharedItems(seats.to(device), items.to(device))


def attend(
    chip: Chip, sizes: Sizes, shapes: Shapes, given: Batch, groups: tuple[Group, ...], window: int | None
) -> torch.Tensor:
    """One decode step, its common beginnings first."""
    device = given.q.device
    kernels, prefix = PagedAttention(chip, sizes, shapes, device), PrefixWalk(chip, sizes, shapes)
    tiling = kernels.tiling
    shape = SharedShape(tiling.shared_rows, tiling.shared_grain, 1)
    seating = Seater(shape, BLOCK_SIZE, 64).seat(groups, given.rows[: len(CONTEXTS)].cpu().numpy().astype(np.int64))
    assert seating is not None
    planner = Planner(chip, tiling, sizes.num_kv_heads, (9, None), device)
    shared = prefix.prepare(on_page(seating, len(given.rows), most_items(64, shape), device))
    parts = planner.plan(given.query_starts, given.context_lens, 0, shared)
    step = Step(parts, given.block_tables, given.rows, given.context_lens, single=True, shared=shared)
    out = torch.full_like(given.q, torch.nan)
    for _ in range(2):
        if window is None:
            prefix.walk(step, given.q, given.caches, SCALE)
        kernels.few(step, given.q, out, given.caches, SCALE, SEES_ALL if window is None else window)
    return out


@pytest.mark.parametrize("num_sms", [1, 7, 60])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((4, 1), 80), ((8, 1), 64), ((2, 2), 64)])
def test_rows_get_what_they_would_get_alone(
    triton_device: torch.device, heads: tuple[int, int], dim: int, num_sms: int
) -> None:
    """Two groups, one of which has more rows than an item; from one program for all tiles to one for each."""
    chip = replace(this_chip(triton_device), num_sms=num_sms)
    shapes = replace(SMALL, shared=Shape(16 if heads == (8, 1) else 32, 32, 4, 2))
    for dtype in dtypes(triton_device):
        sizes = Sizes(*heads, dim, dtype)
        given = batch(CONTEXTS, sizes, triton_device)
        groups = (share(given, [6, 0, 2, 3], 96), share(given, [5, 7, 1, 4], 32))
        check(attend(chip, sizes, shapes, given, groups, None), given.expected(None, sizes))


def test_a_windowed_layer_reads_what_it_sees(triton_device: torch.device) -> None:
    sizes = Sizes(4, 2, 64, torch.float32)
    given = batch(CONTEXTS, sizes, triton_device)
    groups = (share(given, [6, 0, 2, 3], 96),)
    check(attend(this_chip(triton_device), sizes, SMALL, given, groups, 9), given.expected(9, sizes))


def test_soft_cap(triton_device: torch.device) -> None:
    sizes = Sizes(4, 2, 64, torch.float32, soft_cap=2.0)
    given = batch(CONTEXTS, sizes, triton_device)
    groups = (share(given, [6, 0, 2, 3], 96),)
    check(attend(this_chip(triton_device), sizes, SMALL, given, groups, None), given.expected(None, sizes))


def test_scores_far_apart(triton_device: torch.device) -> None:
    """The highest score of a row lies in the common part, far above or below all others."""
    sizes = Sizes(4, 2, 64, torch.float32)
    for sign in (1.0, -1.0):
        given = batch(CONTEXTS, sizes, triton_device)
        given.q.fill_(1.0)
        groups = (share(given, [6, 0, 2, 3], 96),)
        for i in (6, 0, 2, 3):
            k = given.keys[i]
            k.copy_(torch.linspace(-sign, sign, len(k), device=k.device)[:, None, None].expand_as(k) * 20)
            k[:96] = given.keys[6][:96]
            at = torch.arange(len(k), device=k.device)
            table = given.block_tables[int(given.rows[i])]
            given.caches[0][table[at // BLOCK_SIZE].long(), :, at % BLOCK_SIZE] = k
        check(attend(this_chip(triton_device), sizes, SMALL, given, groups, None), given.expected(None, sizes))
