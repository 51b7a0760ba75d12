"""Every attention backend against the definition, on random ragged steps over a cache full of NaN."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.attention.base import AttnLayer, AttnMeta, AttnNeed, KVLayer
from minivllm.attention.invariant import InvariantAttention
from minivllm.attention.select import select_backend
from minivllm.attention.torch_sdpa import TorchAttention
from minivllm.errors import UnsupportedModel
from minivllm.kernels import reference
from minivllm.kernels.ops import reference_ops

BACKENDS = (TorchAttention, InvariantAttention)
HEAD_DIM, NUM_BLOCKS = 24, 150


def need(num_heads: int = 8, num_kv_heads: int = 2, **changes: Any) -> AttnNeed:
    values: dict[str, Any] = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": HEAD_DIM, "windows": (None,), "block_size": 16,
        "dtype": torch.float32, "device": torch.device("cpu"), "batch_invariant": False,
    }  # fmt: skip
    return AttnNeed(**{**values, **changes})


class Step:
    """A random step: rows of (tokens cached before, tokens of this step), each with blocks of its own."""

    def __init__(self, rows: list[tuple[int, int]], heads: tuple[int, int], block_size: int, side_by_side: bool) -> None:
        draw = random.Random(len(rows) * 31 + block_size)
        generator = torch.Generator().manual_seed(len(rows))
        self.rows, self.block_size, (self.num_heads, self.num_kv_heads) = rows, block_size, heads
        free = list(range(1, NUM_BLOCKS))
        if not side_by_side:
            draw.shuffle(free)
        shape = (NUM_BLOCKS, block_size, self.num_kv_heads, HEAD_DIM)
        self.cache = KVLayer(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        self.keys, self.values, tables, slots = [], [], [], []
        for cached, new in rows:
            context = cached + new
            k, v = (torch.randn((context, self.num_kv_heads, HEAD_DIM), generator=generator) for _ in range(2))
            blocks = [free.pop(0) for _ in range(-(-context // block_size))]
            at = [blocks[p // block_size] * block_size + p % block_size for p in range(context)]
            reference.kv_write(k[:cached], v[:cached], self.cache.k, self.cache.v, torch.tensor(at[:cached], dtype=torch.int64))
            self.keys.append(k)
            self.values.append(v)
            tables.append(blocks)
            slots += at[cached:]
        self.q = torch.randn((sum(n for _, n in rows), self.num_heads, HEAD_DIM), generator=generator)
        # Past a row's end stands some other block, as in a real table.
        table = np.full((len(rows), max(map(len, tables)) + 2), NUM_BLOCKS - 1, dtype=np.int32)
        for i, blocks in enumerate(tables):
            table[i, : len(blocks)] = blocks
        starts = np.cumsum([0, *(n for _, n in rows)])
        contexts = np.array([c + n for c, n in rows])
        self.meta = AttnMeta(starts, contexts, table, block_size, torch.tensor(slots))

    def layer(self, window: int | None) -> AttnLayer:
        return AttnLayer(self.num_heads, self.num_kv_heads, HEAD_DIM, 0.3, window)

    def run(self, backend: Any, window: int | None) -> torch.Tensor:
        k = torch.cat([k[c:] for k, (c, _) in zip(self.keys, self.rows, strict=True)])
        v = torch.cat([v[c:] for v, (c, _) in zip(self.values, self.rows, strict=True)])
        return backend.run(backend.plan(self.meta), self.layer(window), self.q, k, v, self.cache)

    def expected(self, window: int | None) -> torch.Tensor:
        parts = self.q.split([n for _, n in self.rows])
        found = [
            reference.attention(q, k, v, cached, 0.3, window)
            for q, k, v, (cached, _) in zip(parts, self.keys, self.values, self.rows, strict=True)
        ]
        return torch.cat(found)


ROWS = [(0, 1), (0, 40), (37, 1), (16, 16), (15, 1), (5, 90), (300, 1), (0, 300), (258, 30), (100, 7)]


@pytest.mark.parametrize("window", [None, 1, 20, 280])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_steps(backend: Any, heads: tuple[int, int], window: int | None) -> None:
    for side_by_side in (True, False):
        step = Step(ROWS, heads, 16, side_by_side)
        made = backend(need(*heads, windows=(window,)), reference_ops())
        torch.testing.assert_close(step.run(made, window), step.expected(window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 7, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_sizes(backend: Any, block_size: int) -> None:
    step = Step([(0, 9), (20, 1), (11, 14)], (4, 2), block_size, False)
    made = backend(need(4, 2, block_size=block_size), reference_ops())
    torch.testing.assert_close(step.run(made, None), step.expected(None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: Any, dtype: torch.dtype) -> None:
    step = Step(ROWS[:6], (8, 2), 16, False)
    expected = step.expected(20)
    step.q, step.cache = step.q.to(dtype), KVLayer(step.cache.k.to(dtype), step.cache.v.to(dtype))
    step.keys, step.values = ([t.to(dtype) for t in ts] for ts in (step.keys, step.values))
    made = backend(need(dtype=dtype), reference_ops())
    found = step.run(made, 20)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swapped_block_is_noticed(backend: Any) -> None:
    step = Step(ROWS[:6], (8, 2), 16, False)
    table = step.meta.block_tables
    table[1, 0], table[5, 0] = table[5, 0], table[1, 0]
    made = backend(need(), reference_ops())
    assert not torch.allclose(step.run(made, None), step.expected(None), atol=1e-2)


@pytest.mark.parametrize("window", [None, 20])
def test_invariant_queries_alone_and_together(window: int | None) -> None:
    """The bits of a query's result are the same in a whole prompt, in chunks and in decode steps."""
    backend = InvariantAttention(need(windows=(window,)), reference_ops())
    whole = Step([(0, 300)], (8, 2), 16, False)
    expected = whole.run(backend, window)
    for cached, new in ((299, 1), (256, 1), (255, 1), (17, 1), (40, 33), (250, 20), (0, 11)):
        part = Step([(cached, new)], (8, 2), 16, True)
        part.keys, part.values = [whole.keys[0][: cached + new]], [whole.values[0][: cached + new]]
        old = torch.arange(cached) + 16  # side by side from block 1 on
        reference.kv_write(whole.keys[0][:cached], whole.values[0][:cached], part.cache.k, part.cache.v, old)
        part.q = whole.q[cached : cached + new]
        assert torch.equal(part.run(backend, window), expected[cached : cached + new]), (cached, new)


def test_selection_keeps_the_reasons() -> None:
    backend, passed_over = select_backend(need(), reference_ops())
    assert backend.name == "torch-sdpa" and passed_over == []
    backend, passed_over = select_backend(need(batch_invariant=True), reference_ops())
    assert backend.name == "batch-invariant"
    assert len(passed_over) == 1 and "torch-sdpa" in passed_over[0] and "batch" in passed_over[0]


def test_no_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.attention.select.PREFERENCE", ("minivllm.attention.torch_sdpa:TorchAttention",))
    with pytest.raises(UnsupportedModel, match="torch-sdpa was passed over: its sums depend on the batch"):
        select_backend(need(batch_invariant=True), reference_ops())
