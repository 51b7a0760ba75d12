"""Every attention backend against the definition, on random ragged steps over a cache full of NaN."""

import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.attention.base import AttnLayer, AttnMeta, AttnNeed, KVLayer
from minivllm.attention.invariant import InvariantAttention
from minivllm.attention.native import NativeAttention
from minivllm.attention.select import select_backend
from minivllm.attention.torch_sdpa import TorchAttention
from minivllm.errors import UnsupportedModel
from minivllm.kernels import reference
from minivllm.kernels.ops import reference_ops

BACKENDS = (TorchAttention, InvariantAttention, NativeAttention)
INVARIANT = (InvariantAttention, NativeAttention)  # whose bits depend on positions alone
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
NUM_BLOCKS, MAX_ROWS, MAX_BLOCKS = 150, 12, 40
NO_BLOCK = 1 << 30  # stands in a table past a row's last block


@pytest.fixture(params=BACKENDS, ids=lambda b: b.name)
def backend_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Any:
    """``make(Backend, need)`` -> a backend; the test is skipped where it cannot be had."""

    def make_backend(backend_class: Any, need: AttnNeed) -> Any:
        ops = request.getfixturevalue("native_table") if backend_class is NativeAttention else reference_ops()
        assert backend_class.missing(need, ops) == []
        return backend_class(need, ops)

    return make_backend


@pytest.fixture
def threads(native_table: Any) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of the compiled kernels; one again afterwards."""
    yield native_table.native.set_threads
    native_table.native.set_threads(1)


def need(num_heads: int = 8, num_kv_heads: int = 2, **changes: Any) -> AttnNeed:
    values: dict[str, Any] = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": 32, "windows": (None,), "block_size": 16,
        "dtype": torch.float32, "kv_dtype": torch.float32, "device": torch.device("cpu"), "batch_invariant": False,
    }  # fmt: skip
    return AttnNeed(**{**values, **changes})


class Scene:
    """Sequences of random tokens in rows of a table, and the cache that a backend fills with them step by step.

    All that the backend has not written is ``unused``: NaN, unless a test says otherwise. A scene's tokens depend on the need
    and the lengths alone.
    """

    def __init__(
        self, backend: Any, need: AttnNeed, lengths: list[int], *, side_by_side: bool = False, unused: float = torch.nan
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.backend, self.need, self.lengths = backend, need, lengths

        def draw(num_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.randn((n, num_heads, need.head_dim), generator=generator).to(dtype) for n in lengths]

        self.q, self.k, self.v = (draw(n, need.dtype) for n in (need.num_heads, need.num_kv_heads, need.num_kv_heads))
        self.cache = KVLayer(*(torch.full(shape, unused, dtype=need.kv_dtype) for shape in backend.pool_shapes(NUM_BLOCKS)))
        self.row_of = random.Random(0).sample(range(MAX_ROWS), len(lengths))  # of the table
        self.table = np.full((MAX_ROWS, MAX_BLOCKS), NO_BLOCK, dtype=np.int32)
        self.computed = [0] * len(lengths)
        free = list(range(1, NUM_BLOCKS))
        if not side_by_side:
            random.Random(1).shuffle(free)
        for row, length in zip(self.row_of, lengths, strict=True):
            for i in range(-(-length // need.block_size)):
                self.table[row, i] = free.pop(0)

    def step(self, work: list[tuple[int, int]], layer: AttnLayer) -> list[torch.Tensor]:
        """Compute the next tokens of some sequences, (sequence, number) each: the result of each."""
        parts = [(i, slice(self.computed[i], self.computed[i] + n)) for i, n in work]
        size, slots = self.need.block_size, []
        for i, part in parts:
            at = np.arange(part.start, part.stop)
            slots.append(self.table[self.row_of[i], at // size].astype(np.int64) * size + at % size)
            self.computed[i] = part.stop
        starts = np.cumsum([0, *(n for _, n in work)])
        contexts = np.array([part.stop for _, part in parts])
        rows = np.array([self.row_of[i] for i, _ in parts])
        # Blocks that a row will only get in later steps are not in its table yet.
        table = self.table.copy()
        for row, context in zip(rows, contexts, strict=True):
            table[row, -(-context // size) :] = NO_BLOCK
        meta = AttnMeta(starts, contexts, rows, table, size, torch.from_numpy(np.concatenate(slots)))
        q, k, v = (torch.cat([of[i][part] for i, part in parts]) for of in (self.q, self.k, self.v))
        found = self.backend.run(self.backend.plan(meta), layer, torch.cat((q, k, v), dim=1), None, self.cache)
        assert found.shape == q.shape and found.dtype == q.dtype
        return list(found.split([n for _, n in work]))

    def expected(self, sequence: int, layer: AttnLayer) -> torch.Tensor:
        """All results of a sequence, in float32 from what the cache can hold of its tokens."""
        k, v = (of[sequence].to(self.need.kv_dtype) for of in (self.k, self.v))
        return reference.attention(self.q[sequence].float(), k, v, 0, layer.scale, layer.window)

    def check(self, steps: list[list[tuple[int, int]]], layer: AttnLayer, **tolerance: float) -> None:
        """Compute these steps and compare every result with the definition."""
        for work in steps:
            before = list(self.computed)
            for (i, n), found in zip(work, self.step(work, layer), strict=True):
                expected = self.expected(i, layer)[before[i] : before[i] + n]
                torch.testing.assert_close(found.float(), expected, msg=lambda m, i=i: f"sequence {i}: {m}", **tolerance)


def layer_of(need: AttnNeed, window: int | None = None, scale: float = 0.3) -> AttnLayer:
    return AttnLayer(need.num_heads, need.num_kv_heads, need.head_dim, scale, window)


ROWS = [(0, 1), (0, 40), (37, 1), (16, 16), (15, 1), (5, 90), (300, 1), (0, 300), (258, 30), (100, 7)]
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def two_steps(rows: list[tuple[int, int]]) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Lengths and steps for rows of (tokens cached before, tokens of the step)."""
    first = [(i, cached) for i, (cached, _) in enumerate(rows) if cached]
    return [cached + new for cached, new in rows], [first, [(i, new) for i, (_, new) in enumerate(rows)]]


@pytest.mark.parametrize("window", [None, 1, 20, 280])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1), (24, 1), (3, 3)])
def test_ragged_steps(make: Any, backend_class: Any, heads: tuple[int, int], window: int | None) -> None:
    asked = need(*heads, windows=(window,))
    lengths, steps = two_steps(ROWS)
    for side_by_side in (True, False):
        scene = Scene(make(backend_class, asked), asked, lengths, side_by_side=side_by_side)
        scene.check(steps, layer_of(asked, window), **EXACT)


@pytest.mark.parametrize(
    ("backend_class", "block_size"),
    [*product((TorchAttention, InvariantAttention), (1, 7, 32)), *product((NativeAttention,), (16, 32, 48, 128))],
)
def test_block_sizes(make: Any, backend_class: Any, block_size: int) -> None:
    asked = need(4, 2, block_size=block_size)
    lengths, steps = two_steps([(0, 9), (20, 1), (11, 14), *([] if block_size == 1 else [(130, 70)])])
    scene = Scene(make(backend_class, asked), asked, [min(n, block_size * MAX_BLOCKS) for n in lengths])
    scene.check(steps, layer_of(asked), **EXACT)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 112, 128, 256])
def test_head_sizes(make: Any, backend_class: Any, head_dim: int) -> None:
    asked = need(6, 2, head_dim=head_dim)
    lengths, steps = two_steps([(0, 70), (90, 1), (30, 9)])
    Scene(make(backend_class, asked), asked, lengths).check(steps, layer_of(asked, scale=head_dim**-0.5), **EXACT)


@pytest.mark.parametrize(("dtype", "kv_dtype"), list(product(DTYPES, DTYPES)))
def test_precisions(make: Any, backend_class: Any, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    asked = need(dtype=dtype, kv_dtype=kv_dtype)
    lengths, steps = two_steps(ROWS[:6])
    exact = dtype == torch.float32 and backend_class is not TorchAttention
    scene = Scene(make(backend_class, asked), asked, lengths)
    scene.check(steps, layer_of(asked, 20), **(EXACT if exact else {"rtol": 0.02, "atol": 0.02}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_torch_attention_of_every_number_of_queries(device: str, dtype: torch.dtype) -> None:
    """Torch's own choice of kernel is wrong on CUDA where the queries are one more than a multiple of 64."""
    asked = need(4, 2, dtype=dtype, kv_dtype=dtype, device=torch.device(device))
    backend, layer, extra = TorchAttention(asked, reference_ops()), layer_of(asked), 23
    generator = torch.Generator().manual_seed(0)
    cache = KVLayer(*(torch.randn(shape, generator=generator).to(device, dtype) for shape in backend.pool_shapes(32)))
    ids = np.arange(32, dtype=np.int32)[None]
    for num_queries in range(1, 300):
        context = num_queries + extra
        q, k, v = (torch.randn((num_queries, n, 32), generator=generator).to(device, dtype) for n in (4, 2, 2))
        slots = torch.arange(extra, context, device=device)
        meta = AttnMeta(np.array([0, num_queries]), np.array([context]), np.array([0]), ids, 16, slots)
        found = backend.run(backend.plan(meta), layer, torch.cat((q, k, v), dim=1), None, cache)
        keys, values = (pool.view(-1, 2, 32)[:context] for pool in (cache.k, cache.v))
        expected = reference.attention(q.float(), keys, values, extra, layer.scale, None)
        bounds = EXACT if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found.float(), expected, msg=lambda m, n=num_queries: f"{n} queries: {m}", **bounds)


@pytest.mark.parametrize("scale", [20.0, -20.0])
def test_scores_far_apart(make: Any, backend_class: Any, scale: float) -> None:
    """The highest score rises from tile to tile by more than e can hold, so what was summed before must vanish."""
    asked = need()
    scene = Scene(make(backend_class, asked), asked, [300, 300])
    scene.q = [torch.ones_like(q) for q in scene.q]
    slope = torch.linspace(-1, 1, 300)[:, None, None]
    scene.k = [(scene.k[0] * 0.01 + slope), (scene.k[1] * 0.01 - slope)]
    scene.check([[(0, 300), (1, 299)], [(1, 1)]], layer_of(asked, scale=scale), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [None, 20])
def test_slots_of_nobody_change_no_bit(make: Any, backend_class: Any, window: int | None) -> None:
    asked = need(windows=(window,))
    lengths, steps = two_steps(ROWS)
    results = []
    for unused in (torch.nan, 0.0, torch.inf, 1e30):
        scene = Scene(make(backend_class, asked), asked, lengths, unused=unused)
        results.append(torch.cat([part for work in steps for part in scene.step(work, layer_of(asked, window))]))
    assert results[0].isfinite().all()
    assert all(torch.equal(r, results[0]) for r in results[1:])


def test_a_swapped_block_is_noticed(make: Any, backend_class: Any) -> None:
    asked = need()
    lengths, steps = two_steps(ROWS[:6])
    scene = Scene(make(backend_class, asked), asked, lengths)
    scene.step(steps[0], layer_of(asked))
    a, b = scene.row_of[2], scene.row_of[5]
    scene.table[a, 0], scene.table[b, 0] = scene.table[b, 0], scene.table[a, 0]
    with pytest.raises(AssertionError, match="sequence 2"):
        scene.check(steps[1:], layer_of(asked), **EXACT)


def test_parts_of_a_wider_tensor(make: Any, backend_class: Any) -> None:
    """q, k and v may be views into the fused projection's output."""
    asked = need()
    scene = Scene(make(backend_class, asked), asked, [50])
    expected = scene.step([(0, 50)], layer_of(asked))[0]
    fused = torch.cat((scene.q[0], scene.k[0], scene.v[0]), dim=1)
    again = Scene(scene.backend, asked, [50])
    again.step([(0, 49)], layer_of(asked))
    slots = torch.tensor([again.table[again.row_of[0], 3] * 16 + 1], dtype=torch.int64)
    rows = np.array(again.row_of)
    meta = AttnMeta(np.array([0, 1]), np.array([50]), rows, again.table, 16, slots)
    found = scene.backend.run(scene.backend.plan(meta), layer_of(asked), fused[49:], None, again.cache)
    torch.testing.assert_close(found, expected[49:], **EXACT)


# ------------------------------------------------------------------------------------------------------- bitwise equality


def whole_prompt(backend: Any, asked: AttnNeed, layer: AttnLayer) -> torch.Tensor:
    """The first of three sequences, computed alone in one step."""
    return Scene(backend, asked, LENGTHS).step([(0, LENGTHS[0])], layer)[0]


LENGTHS = [300, 180, 77]
CHUNKS = [37, 1, 16, 90, 64, 33, 40, *[1] * 19]
assert sum(CHUNKS) == LENGTHS[0]


def ways_to_compute(backend: Any, asked: AttnNeed, layer: AttnLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """The first sequence's results from other steps than one alone."""
    scene = Scene(backend, asked, LENGTHS, side_by_side=True)
    yield "in chunks", torch.cat([scene.step([(0, n)], layer)[0] for n in CHUNKS])
    scene = Scene(backend, asked, LENGTHS)
    yield "in the middle of a batch", scene.step([(1, 100), (0, 300), (2, 77)], layer)[1]
    scene = Scene(backend, asked, LENGTHS)
    yield "in chunks among others", torch.cat([scene.step([(1, 6), (2, 2), (0, n)], layer)[2] for n in CHUNKS])


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("window", [None, 1, 20, 130])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("backend_class", INVARIANT, ids=lambda b: b.name)
def test_bits_depend_on_position_alone(
    make: Any, backend_class: Any, heads: tuple[int, int], window: int | None, block_size: int
) -> None:
    asked = need(*heads, windows=(window,), block_size=block_size, batch_invariant=True)
    backend, layer = make(backend_class, asked), layer_of(asked, window)
    expected = whole_prompt(backend, asked, layer)
    for way, found in ways_to_compute(backend, asked, layer):
        assert torch.equal(found, expected), way


@pytest.mark.parametrize(("dtype", "kv_dtype"), list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("backend_class", INVARIANT, ids=lambda b: b.name)
def test_bits_in_every_precision(make: Any, backend_class: Any, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    asked = need(dtype=dtype, kv_dtype=kv_dtype, batch_invariant=True)
    backend, layer = make(backend_class, asked), layer_of(asked)
    expected = whole_prompt(backend, asked, layer)
    for way, found in ways_to_compute(backend, asked, layer):
        assert torch.equal(found, expected), way


def test_bits_do_not_depend_on_threads(make: Any, threads: Any) -> None:
    asked = need(8, 4)
    backend, layer = make(NativeAttention, asked), layer_of(asked)
    threads(1)
    expected = whole_prompt(backend, asked, layer)
    for count in (2, 3):
        threads(count)
        assert torch.equal(whole_prompt(backend, asked, layer), expected)
        for way, found in ways_to_compute(backend, asked, layer):
            assert torch.equal(found, expected), (count, way)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_query_stays_alone(make: Any, value: float) -> None:
    asked = need()
    backend, layer = make(NativeAttention, asked), layer_of(asked)
    expected = Scene(backend, asked, LENGTHS).step([(0, 300), (1, 7)], layer)
    scene = Scene(backend, asked, LENGTHS)
    scene.q[0][133, 3, 5] = value
    first, second = scene.step([(0, 300), (1, 7)], layer)
    assert first[133, 3].isnan().all()
    first[133, 3] = expected[0][133, 3]
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


def test_a_plan_does_not_grow_with_context(make: Any) -> None:
    backend = make(NativeAttention, need())
    tables, slots = np.zeros((4, 1 << 20), dtype=np.int32), torch.zeros(2, dtype=torch.int64)
    sizes = {
        len(backend.plan(AttnMeta(np.array([0, 1, 2]), np.array([n, n]), np.array([3, 0]), tables, 16, slots)).step)
        for n in (1, 1000, 1_000_000)
    }
    assert len(sizes) == 1


# --------------------------------------------------------------------------------------------------------------- selection


def test_selection_keeps_the_reasons(native_table: Any) -> None:
    backend, passed_over = select_backend(need(), native_table)
    assert backend.name == "native" and passed_over == []
    assert select_backend(need(batch_invariant=True), native_table)[0].name == "native"
    backend, passed_over = select_backend(need(), reference_ops())
    assert backend.name == "torch-sdpa"
    assert len(passed_over) == 2 and "native was passed over" in passed_over[0] and "not in use" in passed_over[0]
    assert "triton was passed over" in passed_over[1] and "not in use" in passed_over[1]
    backend, passed_over = select_backend(need(batch_invariant=True), reference_ops())
    assert backend.name == "batch-invariant"
    assert len(passed_over) == 3 and "torch-sdpa" in passed_over[2] and "batch" in passed_over[2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 7}, "block_size=7 "),
        ({"head_dim": 33}, "head_dim=33 "),
        ({"head_dim": 512}, "head_dim=512 "),
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"kv_dtype": torch.float8_e5m2}, "no kernel for torch.float8_e5m2"),
        ({"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_what_the_native_backend_cannot_serve(native_table: Any, changes: dict[str, Any], reason: str) -> None:
    (said,) = NativeAttention.missing(need(**changes), native_table)
    assert reason in said
    assert select_backend(need(**changes), native_table)[0].name == "torch-sdpa"


def test_no_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.attention.select.PREFERENCE", ("minivllm.attention.torch_sdpa:TorchAttention",))
    with pytest.raises(UnsupportedModel, match="torch-sdpa was passed over: its sums depend on the batch"):
        select_backend(need(batch_invariant=True), reference_ops())
