"""The Triton backend: whole steps over a cache full of NaN, planned from host arrays or on the device."""

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minivllm.attention.base import AttnLayer, AttnMeta, AttnNeed, DeviceMeta, KVLayer, QKNorm
from minivllm.attention.long_prompts import LongPrompts, LongStep, cudnn, find_library, plain
from minivllm.attention.triton import TritonAttention
from minivllm.kernels import reference
from minivllm.kernels.ops import reference_ops
from minivllm.kernels.triton.chip import this_chip

NUM_BLOCKS, MAX_ROWS, MAX_BLOCKS, NO_BLOCK = 90, 8, 24, 1 << 30
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def need(device: torch.device, num_heads: int = 4, num_kv_heads: int = 2, **changes: Any) -> AttnNeed:
    values: dict[str, Any] = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": 64, "windows": (None,), "block_size": 16,
        "dtype": torch.float32, "kv_dtype": torch.float32, "device": device, "batch_invariant": False,
    }  # fmt: skip
    return AttnNeed(**{**values, **changes})


def triton_backend(asked: AttnNeed) -> Any:
    ops = replace(reference_ops(), chip=this_chip(asked.device))
    assert TritonAttention.missing(asked, ops) == []
    return TritonAttention(asked, ops)


class Scene:
    """Sequences of random tokens in rows of a table, and the cache that the backend fills with them step by step."""

    def __init__(self, backend: Any, layer: AttnLayer, lengths: list[int], *, turned: bool = False) -> None:
        asked = backend.need
        self.backend, self.layer, self.size, self.device = backend, layer, asked.block_size, asked.device
        generator = torch.Generator().manual_seed(len(lengths))
        all_heads = asked.num_heads + 2 * asked.num_kv_heads
        drawn = (torch.randn((n, all_heads, asked.head_dim), generator=generator) for n in lengths)
        self.heads = [x.to(asked.device, asked.dtype) for x in drawn]
        angle = torch.randn((max(lengths), asked.head_dim // 2), generator=generator).to(asked.device)
        self.angles = (angle.cos(), angle.sin()) if turned else None  # by position
        shape = backend.pool_shapes(NUM_BLOCKS)[0]
        self.cache = KVLayer(*(torch.full(shape, torch.nan, device=asked.device, dtype=asked.kv_dtype) for _ in range(2)))
        self.row_of = random.Random(0).sample(range(MAX_ROWS), len(lengths))
        self.table = np.full((MAX_ROWS, MAX_BLOCKS), NO_BLOCK, dtype=np.int32)
        free = list(range(1, NUM_BLOCKS))
        random.Random(1).shuffle(free)
        for row, length in zip(self.row_of, lengths, strict=True):
            for i in range(-(-length // self.size)):
                self.table[row, i] = free.pop(0)
        self.computed = [0] * len(lengths)

    def meta(self, parts: list[tuple[int, slice]]) -> AttnMeta:
        """The step that computes these tokens of these sequences."""
        slots = []
        for i, part in parts:
            at = np.arange(part.start, part.stop)
            slots.append(self.table[self.row_of[i], at // self.size].astype(np.int64) * self.size + at % self.size)
        starts = np.cumsum([0, *(part.stop - part.start for _, part in parts)])
        contexts, rows = np.array([part.stop for _, part in parts]), np.array([self.row_of[i] for i, _ in parts])
        return AttnMeta(starts, contexts, rows, self.table, self.size, torch.from_numpy(np.concatenate(slots)).to(self.device))

    def step(self, work: list[tuple[int, int]], captured: bool = False, decode: bool = False, spare: int = 0) -> list[Tensor]:
        """Compute the next tokens of some sequences, (sequence, number) each: the result of each.

        ``captured``: as in a graph, planned from device arrays alone, with ``spare`` padded rows and tokens.
        """
        parts = [(i, slice(self.computed[i], self.computed[i] + n)) for i, n in work]
        for i, part in parts:
            self.computed[i] = part.stop
        host = self.meta(parts)
        heads = torch.cat([self.heads[i][part] for i, part in parts])
        angles = None
        if self.angles is not None:
            at = torch.cat([torch.arange(part.start, part.stop) for _, part in parts] + [torch.zeros(spare, dtype=torch.int64)])
            angles = (self.angles[0][at], self.angles[1][at])
        if captured:
            starts = np.pad(host.query_starts, (0, spare), mode="edge")
            arrays = (starts, np.pad(host.context_lens, (0, spare)), np.pad(host.rows, (0, spare)), self.table)
            on_device = (torch.from_numpy(x).to(self.device, torch.int32) for x in arrays)
            slots = torch.nn.functional.pad(host.slots, (0, spare))
            heads = torch.nn.functional.pad(heads, (0, 0, 0, 0, 0, spare))
            plan = self.backend.plan_on_device(DeviceMeta(*on_device, slots, self.size, decode=decode, host=None))
        else:
            plan = self.backend.plan(host)
        found = self.backend.run(plan, self.layer, heads, angles, self.cache)
        assert found.shape == (len(heads), self.layer.num_heads, self.layer.head_dim) and found.dtype == heads.dtype
        return list(found[: len(heads) - spare].split([n for _, n in work]))

    def expected(self, i: int) -> Tensor:
        """All results of a sequence."""
        layer = self.layer
        q, k, v = self.heads[i].split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)
        if (norm := layer.qk_norm) is not None:
            q, k = reference.rms_norm(q, norm.q, norm.eps), reference.rms_norm(k, norm.k, norm.eps)
        if self.angles is not None:
            q, k = (reference.rope(x, *(a[: len(x)] for a in self.angles)) for x in (q, k))
        k, v = (x.to(self.cache.k.dtype) for x in (k, v))
        return reference.attention(q.float(), k, v, 0, layer.scale, layer.window)

    def check(self, work: list[tuple[int, int]], tolerance: dict[str, float] = EXACT, **how: Any) -> None:
        before = list(self.computed)
        for (i, n), found in zip(work, self.step(work, **how), strict=True):
            torch.testing.assert_close(found.float(), self.expected(i)[before[i] : before[i] + n], **tolerance)


def layer_of(asked: AttnNeed, window: int | None = None, norm: QKNorm | None = None) -> AttnLayer:
    return AttnLayer(asked.num_heads, asked.num_kv_heads, asked.head_dim, 0.2, window, norm)


@pytest.mark.parametrize("captured", [False, True])
def test_prompts_decodes_and_both(triton_device: torch.device, captured: bool) -> None:
    asked = need(triton_device, windows=(None, 30))
    weights = torch.linspace(0.5, 1.5, 64, device=triton_device)
    norm, how = QKNorm(weights, weights.flip(0), 1e-6), {"captured": captured, "spare": 3 if captured else 0}
    backend = triton_backend(asked)
    for window in (None, 30):
        scene = Scene(backend, layer_of(asked, window, norm), [90, 40, 52], turned=True)
        scene.check([(0, 70), (2, 30)], **how)
        scene.check([(0, 1), (1, 39), (2, 20)], **how)
        scene.check([(2, 1), (1, 1), (0, 1)], **how, decode=captured)
        scene.check([(0, 3), (2, 1)], **how)


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(triton_device: torch.device, block_size: int) -> None:
    asked = need(triton_device, block_size=block_size)
    scene = Scene(triton_backend(asked), layer_of(asked), [150, 33])
    scene.check([(0, 149), (1, 32)])
    scene.check([(1, 1), (0, 1)], captured=True, decode=True)


def test_a_cache_of_another_type(triton_device: torch.device) -> None:
    asked = need(triton_device, kv_dtype=torch.float16)
    scene = Scene(triton_backend(asked), layer_of(asked), [70, 33])
    scene.check([(0, 69), (1, 32)])
    scene.check([(1, 1), (0, 1)])


def test_an_invariant_backend(triton_device: torch.device) -> None:
    asked = need(triton_device, batch_invariant=True)
    backend = triton_backend(asked)
    whole = Scene(backend, layer_of(asked), [75, 40])
    whole.check([(0, 75)])
    expected = Scene(backend, layer_of(asked), [75, 40]).step([(0, 75)])[0]
    chunks = Scene(backend, layer_of(asked), [75, 40])
    found = [chunks.step([(0, 50)])[0], chunks.step([(1, 7), (0, 24)])[1]]
    found.append(chunks.step([(1, 1), (0, 1)], captured=True, decode=True)[1])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("windows", [(None,), (None, 30)])
def test_long_prompts_by_a_library(triton_device: torch.device, windows: tuple[int | None, ...]) -> None:
    """Grains of 32: whole ones go to the library, also of later chunks after whole ones; the rest does not."""
    asked = need(triton_device, windows=windows)
    backend = triton_backend(asked)
    backend.long_prompts = LongPrompts(asked, this_chip(triton_device), plain, grain=32)
    for window in windows:
        scene = Scene(backend, layer_of(asked, window), [140, 64, 64, 40, 150], turned=True)
        scene.check([(3, 20), (1, 64), (2, 64)])  # two rows in one call
        scene.check([(0, 64), (3, 1), (4, 70)])
        scene.check([(0, 70), (3, 2), (4, 40)])  # after a past of two grains, and one that is none
        scene.check([(0, 1), (4, 1)], captured=True, decode=True)
        assert window is not None or backend.long_prompts.plan(scene.meta([(0, slice(64, 134))]), scene.cache.k) is not None


def numbers(step: LongStep) -> list[tuple[int, int, int, int]]:
    return [(c.first_token, c.num_rows, c.length, c.past) for c in step.calls]


def test_what_the_library_is_given(triton_device: torch.device) -> None:
    asked = need(triton_device)
    long = LongPrompts(asked, this_chip(triton_device), plain, grain=32)
    scene = Scene(triton_backend(asked), layer_of(asked), [70, 64, 64, 33])
    tables = torch.from_numpy(scene.table)
    step = long.plan(scene.meta([(1, slice(0, 64)), (2, slice(0, 64)), (0, slice(0, 70)), (3, slice(32, 33))]), tables)
    assert step is not None and step.taken.tolist() == [64, 64, 64, 0]
    assert numbers(step) == [(0, 3, 64, 0)]
    step = long.plan(scene.meta([(0, slice(32, 70)), (1, slice(0, 33)), (2, slice(0, 64))]), tables)
    assert step is not None
    assert numbers(step) == [(0, 1, 32, 32), (38, 1, 32, 0), (71, 1, 64, 0)]
    assert long.plan(scene.meta([(0, slice(33, 66)), (1, slice(0, 31))]), tables) is None


def test_cudnn_where_it_can_be_had(triton_device: torch.device) -> None:
    library, note = find_library(need(triton_device, dtype=torch.bfloat16, kv_dtype=torch.bfloat16))
    assert (library is None) == (triton_device.type == "cpu"), note
    library, note = find_library(need(triton_device))
    assert library is None and "cuDNN" in note
    assert callable(cudnn)


def test_what_it_does_not_serve(triton_device: torch.device) -> None:
    ops = replace(reference_ops(), chip=this_chip(triton_device))

    def reasons(**changes: Any) -> str:
        return "; ".join(TritonAttention.missing(need(triton_device, **changes), ops))

    assert reasons() == ""
    assert "head_dim=257" in reasons(head_dim=257)
    assert "head_dim=12" in reasons(head_dim=12)
    assert "float64" in reasons(dtype=torch.float64)
    assert "128 query heads" in reasons(num_heads=128, num_kv_heads=1)
    assert "not in use" in "; ".join(TritonAttention.missing(need(triton_device), reference_ops()))


def test_asking_does_not_import_triton() -> None:
    """A program on a CPU asks this backend first, and may have no Triton."""
    code = "import sys; import minivllm.attention.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
