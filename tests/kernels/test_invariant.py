"""Batch-invariant ops: a row's bits depend on nothing but the row."""

from collections.abc import Iterator

import pytest
import torch

from minivllm.kernels.invariant import ROW_TILE, check_linear
from minivllm.kernels.ops import Ops, invariant_ops
from minivllm.kernels.reference import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(384, 640), (384, 1792), (896, 384), (64, 96), (24, 40), (48, 16), (768, 2304), (1000, 17), (64, 7)]


def rows_of(count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((count, dim), generator=torch.Generator().manual_seed(dim)).mul_(3).to(dtype)


@pytest.fixture(params=["torch", "native"])
def table(request: pytest.FixtureRequest) -> Ops:
    return request.getfixturevalue("native_table") if request.param == "native" else invariant_ops()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, table: Ops) -> Iterator[int]:
    set_threads = torch.set_num_threads if table.native is None else table.native.set_threads
    set_threads(request.param)
    yield request.param
    set_threads(1)


CUTS = ((0, 1), (1, 2), (3, 40), (31, 33), (40, 100), (99, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_rows(dtype: torch.dtype, threads: int, table: Ops) -> None:
    for num_in, num_out in SHAPES:
        weight = rows_of(num_out, num_in, dtype)
        bias = rows_of(1, num_out, dtype)[0]
        x = rows_of(100, num_in, dtype)
        for matrix in (table.pack(weight, None), table.pack(*quantize_rows(weight))):
            whole, logits = table.linear(x, matrix, bias), table.logits(x, matrix)
            for low, high in CUTS:
                assert torch.equal(table.linear(x[low:high], matrix, bias), whole[low:high]), (num_in, num_out, low, high)
                assert torch.equal(table.logits(x[low:high], matrix), logits[low:high]), (num_in, num_out, low, high)
            assert torch.equal(table.linear(x.flip(0), matrix, bias).flip(0), whole)
        assert check_linear(weight)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_rows(name: str, dtype: torch.dtype, threads: int, table: Ops) -> None:
    for dim in (7, 96, 896, 1000):
        x = rows_of(100, 2 * dim, dtype)
        alone, gated = table.activation(x, name), table.gated_activation(x, name)
        for low, high in CUTS:
            assert torch.equal(table.activation(x[low:high], name), alone[low:high])
            assert torch.equal(table.gated_activation(x[low:high], name), gated[low:high])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_rope_rows(dtype: torch.dtype, threads: int, table: Ops) -> None:
    for dim in (24, 384, 1000):
        x, w = rows_of(100, dim, dtype), rows_of(2, dim, dtype)
        cos = rows_of(100, dim // 2, torch.float32)
        whole = (table.rms_norm(x, w[0], 1e-6), table.layer_norm(x, w[0], w[1], 1e-5), table.rope(x[:, None], cos, cos + 1))
        for low, high in CUTS:
            part = x[low:high]
            assert torch.equal(table.rms_norm(part, w[0], 1e-6), whole[0][low:high])
            assert torch.equal(table.layer_norm(part, w[0], w[1], 1e-5), whole[1][low:high])
            assert torch.equal(table.rope(part[:, None], cos[low:high], cos[low:high] + 1), whole[2][low:high])


def test_the_check_sees_rows_that_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that lets one row reach another is found out."""

    def mixing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T + 1e-6 * x.sum()

    monkeypatch.setattr("minivllm.kernels.invariant.F.linear", mixing)
    assert not check_linear(torch.ones(8, ROW_TILE))
