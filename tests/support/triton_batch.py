"""Steps of random tokens for the attention kernels, over a paged cache that is NaN wherever no token was written."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.triton.attention_sizes import Shape, Shapes, Sizes

BLOCK_SIZE, MAX_BLOCKS, NO_BLOCK, SCALE = 16, 24, 1 << 30, 0.25
SMALL = Shapes(Shape(16, 32, 4, 2), Shape(32, 32, 4, 2), Shape(32, 32, 4, 2), 1, invariant=False)


def dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]


@dataclass
class Batch:
    """One step of random tokens: what the kernels are given, and what they are to give."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    rows: Tensor
    keys: list[Tensor]  # of each row [context, num_kv_heads, head_dim]
    values: list[Tensor]

    def expected(self, window: int | None, sizes: Sizes) -> Tensor:
        parts = []
        for i, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            q = self.q[int(self.query_starts[i]) : int(self.query_starts[i + 1])]
            if sizes.soft_cap:
                parts.append(capped(q, k, v, sizes.soft_cap))
            else:
                parts.append(reference.attention(q.float(), k, v, len(k) - len(q), SCALE, window))
        return torch.cat(parts)


def capped(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """``reference.attention`` with soft-capped scores."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * SCALE
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = (cap * (scores / cap).tanh()).masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def batch(rows: list[tuple[int, int]], sizes: Sizes, device: torch.device, seed: int = 0, spare_rows: int = 2) -> Batch:
    """Blocks of all rows are shuffled; ``spare_rows`` rows of the step hold nothing, as in a padded one."""
    generator, shuffled = torch.Generator().manual_seed(seed), random.Random(seed)
    num_blocks = 1 + sum(-(-(a + b) // BLOCK_SIZE) for a, b in rows)
    free = shuffled.sample(range(1, num_blocks), num_blocks - 1)
    place = shuffled.sample(range(len(rows) + 2), len(rows))
    tables = torch.full((len(rows) + 2, MAX_BLOCKS), NO_BLOCK, dtype=torch.int32)
    shape = (num_blocks, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
    pools = [torch.full(shape, torch.nan, dtype=sizes.dtype) for _ in range(2)]
    kept: list[list[Tensor]] = [[], []]
    for (cached, new), row in zip(rows, place, strict=True):
        context = cached + new
        blocks = [free.pop() for _ in range(-(-context // BLOCK_SIZE))]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        at = torch.arange(context)
        for pool, tensors in zip(pools, kept, strict=True):
            drawn = torch.randn((context, sizes.num_kv_heads, sizes.head_dim), generator=generator).to(sizes.dtype)
            pool[tables[row, at // BLOCK_SIZE].long(), :, at % BLOCK_SIZE] = drawn
            tensors.append(drawn.to(device))
    starts = torch.tensor([0] + [n for _, n in rows] + [0] * spare_rows).cumsum(0)
    contexts = torch.tensor([a + b for a, b in rows] + [0] * spare_rows)
    q = torch.randn((int(starts[-1]), sizes.num_heads, sizes.head_dim), generator=generator).to(device, sizes.dtype)
    on_device = (t.to(device, torch.int32) for t in (starts, contexts, tables, torch.tensor(place + [0] * spare_rows)))
    return Batch(q, (pools[0].to(device), pools[1].to(device)), *on_device, *kept)


def check(found: Tensor, expected: Tensor) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if found.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.float(), expected, **tolerance)
