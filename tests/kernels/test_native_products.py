"""The compiled products: float64's values, int8 to the bit, and bits that depend on a row alone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.matrix import Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("float32", "bfloat16", "float16", "int8")  # of weights
# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (num_out, num_in): whole panels and steps, parts of them, single ones, a row of blocks.
SHAPES = [(1, 1), (1, 70), (3, 5), (64, 3), (33, 65), (96, 384), (130, 1027), (51, 2600)]


@pytest.fixture
def threads(native_table: Any) -> Iterator[Callable[[int], None]]:
    """Sets the kernels' number of threads; puts it back."""
    yield native_table.native.set_threads
    native_table.native.set_threads(1)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(kind: str, num_out: int, num_in: int) -> tuple[Tensor, Tensor | None]:
    """Values as a checkpoint has them, or int8 and scales."""
    values = draw(num_out, num_in, seed=1)
    return reference.quantize_rows(values) if kind == "int8" else (values.to(getattr(torch, kind)), None)


def input_dtype(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "int8" else getattr(torch, kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_product(native_table: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    num_out, num_in = shape
    values, x, bias = draw(*shape, dtype=dtype, seed=1), draw(19, num_in, dtype=dtype), draw(num_out, dtype=dtype, seed=2)
    matrix = native_table.pack(values, None)
    exact = x.double() @ values.double().t()
    # A float32 sum of n terms is off by about n / 2 roundings of the size of a term; the largest of many by some times that.
    rounded = 4 * 2.0**-24 * (num_in + 1)
    for bias_or_none, expected in ((None, exact), (bias, exact + bias.double())):
        found = native_table.linear(x, matrix, bias_or_none)
        assert found.dtype == dtype and found.is_contiguous()
        assert ((found.double() - expected).abs() <= rounded + ROUNDING[dtype] * expected.abs()).all()
    logits = native_table.logits(x, matrix)
    assert logits.dtype == torch.float32
    assert ((logits.double() - exact).abs() <= rounded + 2.0**-24 * exact.abs()).all()
    assert torch.equal(logits.to(dtype), native_table.linear(x, matrix, None))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_the_reference_to_the_bit(native_table: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    num_out, num_in = shape
    values, scales = reference.quantize_rows(draw(*shape, seed=1))
    x, bias = draw(19, num_in, dtype=dtype), draw(num_out, dtype=dtype, seed=2)
    x[4] = 0
    plain, matrix = reference.pack(values, scales), native_table.pack(values, scales)
    for bias_or_none in (None, bias):
        expected = reference.linear(x, plain, bias_or_none)
        assert torch.equal(native_table.linear(x, matrix, bias_or_none), expected)
    assert torch.equal(native_table.logits(x, matrix).to(dtype), reference.linear(x, plain, None))


@pytest.mark.parametrize("shape", [(1, 1), (50, 7), (130, 1030)], ids=str)
def test_int8_sums_are_exact(native_table: Any, shape: tuple[int, int]) -> None:
    """With 127 in every row its scale is 1, and what comes out are the sums: also the largest that there can be."""
    num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    values[0] = 127
    x = torch.randint(-127, 128, (21, num_in), generator=generator)
    x[:, 0], x[5], x[6] = 127, 127, -127
    matrix = native_table.pack(values, torch.ones(num_out))
    assert torch.equal(native_table.logits(x.float(), matrix).long(), x @ values.long().t())


@pytest.mark.parametrize("shape", [(33, 65), (200, 2600)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_depend_on_it_alone(
    native_table: Any, threads: Callable[[int], None], kind: str, shape: tuple[int, int]
) -> None:
    """Whatever the batch, its place in it and the number of threads: tiles, blocks, what a thread gets differ in each."""
    dtype = input_dtype(kind)
    matrix = native_table.pack(*weights(kind, *shape))
    x, bias = draw(300, shape[1], dtype=dtype), draw(shape[0], dtype=dtype, seed=2)
    threads(1)
    alone = torch.cat([native_table.linear(row[None], matrix, bias) for row in x])
    logits = native_table.logits(x, matrix)
    for count in (1, 2, 3):
        threads(count)
        for num_rows in (*range(2, 71), 300):
            first = 7 * num_rows % (301 - num_rows)
            rows = slice(first, first + num_rows)
            assert torch.equal(native_table.linear(x[rows], matrix, bias), alone[rows]), (count, num_rows)
        assert torch.equal(native_table.logits(x[40:90], matrix), logits[40:90])


@pytest.mark.parametrize("num_in", [64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_x_may_be_a_view(native_table: Any, kind: str, num_in: int) -> None:
    """Nothing beside a row is read: there are NaNs on either side."""
    wide = torch.full((9, 3 * num_in), float("nan"), dtype=input_dtype(kind))
    x = wide[:, num_in : 2 * num_in]
    x.copy_(draw(9, num_in))
    matrix = native_table.pack(*weights(kind, 40, num_in))
    expected = native_table.linear(x.contiguous(), matrix, None)
    assert expected.isfinite().all()
    assert torch.equal(native_table.linear(x, matrix, None), expected)
    assert torch.equal(native_table.linear(x.t().contiguous().t(), matrix, None), expected)
    assert torch.equal(native_table.linear(x[::2], matrix, None), expected[::2])


@pytest.mark.parametrize("num_in", [96, 97, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_a_multiple_of_a_page_apart(
    native_table: Any, threads: Callable[[int], None], kind: str, num_in: int
) -> None:
    """Such rows are copied closer together first, by several threads: none may write into another's."""
    wide = torch.full((900, 2048), float("nan"), dtype=input_dtype(kind))
    x = wide[:, :num_in]
    x.copy_(draw(900, num_in))
    matrix = native_table.pack(*weights(kind, 64, num_in))
    expected = torch.cat([native_table.linear(row[None], matrix, None) for row in x.contiguous()])
    threads(3)
    for _ in range(20):
        assert torch.equal(native_table.linear(x, matrix, None), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_numbers_keeps_to_itself(native_table: Any, kind: str, value: float) -> None:
    x, matrix = draw(9, 65, dtype=input_dtype(kind)), native_table.pack(*weights(kind, 40, 65))
    expected = native_table.linear(x, matrix, None)
    for column in (0, 37, 64):
        broken = x.clone()
        broken[4, column] = value
        found = native_table.linear(broken, matrix, None)
        assert not found[4].isfinite().any()
        assert torch.equal(found[:4], expected[:4]) and torch.equal(found[5:], expected[5:])


def test_the_smallest_and_largest_numbers_survive_int8(native_table: Any) -> None:
    values, scales = weights("int8", 40, 64)
    matrix = native_table.pack(values, scales)
    x = draw(3, 64)
    expected = native_table.logits(x, matrix)
    for power in (-100, 100):  # a power of two changes no rounding
        assert torch.equal(native_table.logits(x * 2.0**power, matrix), expected * 2.0**power)
    assert native_table.logits(x * 1e-42, matrix).abs().max() < 1e-38


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_back_what_was_packed(native_table: Any, kind: str, shape: tuple[int, int]) -> None:
    values, scales = weights(kind, *shape)
    matrix, plain = native_table.pack(values, scales), Matrix(values, *shape, scales)
    ids = torch.randint(0, shape[0], (50,), generator=torch.Generator().manual_seed(3))
    for dtype in DTYPES if kind == "int8" else (values.dtype,):
        found = native_table.lookup(ids, matrix, dtype)
        assert found.dtype == dtype and torch.equal(found, reference.lookup(ids, plain, dtype))
    assert torch.equal(native_table.lookup(ids[::3], matrix, found.dtype), found[::3])


@pytest.mark.parametrize("beyond", [-1, 40])
def test_lookup_refuses_what_is_not_there(native_table: Any, beyond: int) -> None:
    matrix = native_table.pack(draw(40, 8), None)  # its last panel reaches further
    with pytest.raises(IndexError, match="40"):
        native_table.lookup(torch.tensor([3, beyond]), matrix, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(native_table: Any, kind: str) -> None:
    matrix, dtype = native_table.pack(*weights(kind, 40, 65)), input_dtype(kind)
    assert native_table.linear(draw(0, 65, dtype=dtype), matrix, None).shape == (0, 40)
    assert native_table.lookup(torch.empty(0, dtype=torch.int64), matrix, dtype).shape == (0, 65)


def test_what_does_not_meet_is_refused(native_table: Any) -> None:
    matrix = native_table.pack(draw(40, 64), None)
    for x in (draw(3, 63), draw(3, 64, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match="does not meet"):
            native_table.linear(x, matrix, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_matrix_is_not_much_larger(native_table: Any, kind: str) -> None:
    """Memory is what was said at start: the padding is less than a panel and a step."""
    values, scales = weights(kind, 384, 384)
    matrix = native_table.pack(values, scales)
    assert values.nbytes <= matrix.values.nbytes <= values.nbytes * 1.15
    assert matrix.nbytes == sum(t.nbytes for t in (matrix.values, matrix.scales, matrix.sums) if t is not None)
