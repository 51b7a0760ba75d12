"""The row kernels against loops that say the same, on ragged steps with padding."""

import random
from typing import Any

import numpy as np
import pytest
import torch

BLOCK_SIZE, MAX_ROWS, WIDTH = 16, 12, 100


@pytest.fixture
def kernels(triton_device: torch.device) -> Any:
    from minivllm.kernels.triton.chip import this_chip
    from minivllm.kernels.triton.steps import StepKernels

    return StepKernels(this_chip(triton_device), BLOCK_SIZE, MAX_ROWS)


def ints(values: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("lengths", [[1], [1] * 7, [5, 1, 33, 1], [200], [1, 130, 2]])
@pytest.mark.parametrize("padding", [0, 3, 150])
def test_expand(kernels: Any, triton_device: torch.device, lengths: list[int], padding: int) -> None:
    chance = random.Random(repr((lengths, padding)))
    rows = chance.sample(range(MAX_ROWS), len(lengths))
    contexts = [n + chance.randrange(60) for n in lengths]
    tokens = torch.randint(0, 5000, (MAX_ROWS + 1, 400), dtype=torch.int32)
    blocks = torch.randint(1, 900, (MAX_ROWS + 1, WIDTH), dtype=torch.int32)
    expected = [
        (int(tokens[row, at]), at, int(blocks[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE)
        for row, length, context in zip(rows, lengths, contexts, strict=True)
        for at in range(context - length, context)
    ]
    total = sum(lengths)
    starts = np.cumsum([0, *lengths]).tolist() + [total] * (MAX_ROWS - len(lengths))
    left = [0] * (MAX_ROWS - len(lengths))
    on_device = tuple(ints(values, triton_device) for values in (starts, contexts + left, rows + left))
    out = tuple(torch.full((total + padding,), -7, dtype=torch.int64, device=triton_device) for _ in range(3))
    kernels.expand(on_device, (tokens.to(triton_device), blocks.to(triton_device)), out)
    found = list(zip(*(t.tolist() for t in out), strict=True))
    assert found[:total] == expected
    assert all(token == 0 and at == 0 and 0 <= slot < BLOCK_SIZE for token, at, slot in found[total:])


def test_scatter(kernels: Any, triton_device: torch.device) -> None:
    """Runs of any length reach their table, row and column, and nothing else is touched."""
    from minivllm.runner.page import Runs

    runs, offset = Runs(), 5
    prompt = [random.Random(1).randrange(5000) for _ in range(2500)]
    runs.add_tokens(3, 0, prompt)
    runs.add_blocks(3, 0, (9, 8, 7))
    runs.add_blocks(11, 40, (6,))
    runs.add_blocks(2, 1, ())  # nothing
    packed, count, longest = runs.packed(offset)
    assert (count, longest) == (3, 2500)
    page = torch.cat((torch.zeros(offset, dtype=torch.int32), torch.from_numpy(packed))).to(triton_device)
    tokens = torch.full((MAX_ROWS + 1, 3000), -1, dtype=torch.int32, device=triton_device)
    blocks = torch.full((MAX_ROWS + 1, WIDTH), -1, dtype=torch.int32, device=triton_device)
    kernels.scatter(page, page[offset : offset + count * 5].view(count, 5), longest, tokens, blocks)
    expected = torch.full_like(tokens, -1)
    expected[3, :2500] = ints(prompt, triton_device)
    assert torch.equal(tokens, expected)
    expected = torch.full_like(blocks, -1)
    expected[3, :3], expected[11, 40] = ints((9, 8, 7), triton_device), 6
    assert torch.equal(blocks, expected)


def test_put(kernels: Any, triton_device: torch.device) -> None:
    """Every row's token goes to its place, and to the host with a mark where the row was bad."""
    num_rows = 140
    wishes = torch.zeros((num_rows, 6), dtype=torch.int32)
    wishes[:, 0], wishes[:, 1] = torch.arange(num_rows), torch.arange(num_rows) % 7
    chosen = torch.arange(num_rows, dtype=torch.int64) * 3
    finite = torch.arange(num_rows) % 5 != 0
    tokens = torch.full((num_rows + 1, 8), -1, dtype=torch.int32)
    expected = tokens.clone()
    expected[wishes[:, 0].long(), wishes[:, 1].long()] = chosen.int()
    tokens, out = tokens.to(triton_device), torch.zeros(num_rows, dtype=torch.int32, device=triton_device)
    kernels.put(*(t.to(triton_device) for t in (chosen, finite, wishes)), tokens, out)
    assert torch.equal(tokens.cpu(), expected)
    assert out.tolist() == [t if good else -1 - t for t, good in zip(chosen.tolist(), finite.tolist(), strict=True)]
