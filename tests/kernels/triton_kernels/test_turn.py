"""The pass in front of attention against the reference ops, one after the other, over a cache full of NaN."""

from itertools import product

import pytest
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.turn import Turn

NUM_BLOCKS, BLOCK_SIZE, EPS = 9, 16, 1e-6
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.016, "atol": 1e-3}}


def dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(device, dtype)


def caches(num_kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    return torch.full(shape, torch.nan, device=device, dtype=dtype), torch.full(shape, torch.nan, device=device, dtype=dtype)


def expected(heads: Tensor, sizes: tuple[int, int], norm: object, angles: object) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads.split((sizes[0], sizes[1], sizes[1]), dim=1)
    if norm is not None:
        q, k = reference.rms_norm(q, norm[0], norm[2]), reference.rms_norm(k, norm[1], norm[2])
    if angles is not None:
        q, k = reference.rope(q, *angles), reference.rope(k, *angles)
    return q, k, v


@pytest.mark.parametrize(("normed", "head_dim", "half"), [
    (True, 128, 64), (False, 64, 32), (True, 80, 40), (False, 80, 0), (True, 96, 0), (False, 64, 8), (True, 48, 12),
    (True, 256, 128),
])  # fmt: skip
def test_like_the_ops_one_by_one(triton_device: torch.device, normed: bool, head_dim: int, half: int) -> None:
    device = triton_device
    for dtype, (num_heads, num_kv_heads) in product(dtypes(device), ((4, 2), (5, 5), (9, 1))):
        num_tokens = 5
        heads = draw(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device, dtype=dtype)
        norm = (*(draw(head_dim + i, device=device, dtype=dtype)[:head_dim] for i in (0, 1)), EPS) if normed else None
        turns = draw(num_tokens, half or 1, device=device) * 3
        angles = (turns.cos(), turns.sin()) if half else None
        slots = torch.tensor([37, 3, 130, 16, 47], device=device)
        pools = caches(num_kv_heads, head_dim, device, dtype)
        k_out = torch.full((num_tokens, num_kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
        q = Turn(this_chip(device), num_heads, num_kv_heads).turn_and_write(heads, norm, angles, pools, slots, k_out)
        want_q, want_k, want_v = expected(heads, (num_heads, num_kv_heads), norm, angles)
        torch.testing.assert_close(q, want_q, **TOLERANCE[dtype])
        torch.testing.assert_close(k_out, want_k, **TOLERANCE[dtype])
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        torch.testing.assert_close(pools[0][block, :, offset], k_out, rtol=0, atol=0)
        torch.testing.assert_close(pools[1][block, :, offset], want_v, rtol=0, atol=0)
        for pool in pools:  # nothing else was written
            pool[block, :, offset] = torch.nan
            assert pool.isnan().all()


def test_a_cache_of_another_type(triton_device: torch.device) -> None:
    heads = draw(3, 6, 64, device=triton_device)
    slots = torch.tensor([1, 40, 2], device=triton_device)
    pools = caches(1, 64, triton_device, torch.float16)
    q = Turn(this_chip(triton_device), 4, 1).turn_and_write(heads, None, None, pools, slots)
    torch.testing.assert_close(q, heads[:, :4])
    for pool, part in zip(pools, heads[:, 4:].split(1, dim=1), strict=True):
        torch.testing.assert_close(pool[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE], part.half(), rtol=0, atol=0)


def test_a_head_depends_on_itself_alone(triton_device: torch.device) -> None:
    device = triton_device
    heads, angle = draw(4, 6, 80, device=device), draw(4, 20, device=device)
    norm, turn = (draw(80, device=device), draw(81, device=device)[:80], EPS), Turn(this_chip(device), 4, 1)
    together = turn.turn_and_write(
        heads, norm, (angle.cos(), angle.sin()), caches(1, 80, device, torch.float32), torch.arange(4, device=device)
    )
    for i in range(4):
        one, slot = angle[i : i + 1], torch.tensor([5], device=device)
        pools = caches(1, 80, device, torch.float32)
        alone = turn.turn_and_write(heads[i : i + 1], norm, (one.cos(), one.sin()), pools, slot)
        assert torch.equal(alone[0], together[i])


def test_no_tokens(triton_device: torch.device) -> None:
    pools = caches(1, 64, triton_device, torch.float32)
    empty = torch.empty((0, 4, 64), device=triton_device)
    slots = torch.empty(0, dtype=torch.int64, device=triton_device)
    assert Turn(this_chip(triton_device), 2, 1).turn_and_write(empty, None, None, pools, slots).shape == (0, 2, 64)
