"""The Triton norms, activations and gathers: the reference's values, and bits that depend on a row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.elementwise import Elementwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place of a 16-bit result; for float32 sums may be in another order and exp and rsqrt by other formulas.
CLOSE = {
    torch.float32: {"rtol": 5e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 2e-6},
}
DIMS = (1024, 768, 128, 70, 5)  # whole vectors, not a power of two, several rows a program, odd ends


@pytest.fixture
def kernels(triton_device: torch.device) -> Elementwise:
    return Elementwise(this_chip(triton_device))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, triton_device: torch.device) -> torch.dtype:
    if request.param is torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter cuts a number to bfloat16 instead of rounding it")
    return request.param


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(device, dtype)


def norms(table: Any, dim: int, like: Tensor) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Each norm of a table as a function of its rows alone."""
    weight, bias = (random(like.device, dim, dtype=like.dtype, seed=s) for s in (1, 2))
    return {
        "rms_norm": lambda x: (table.rms_norm(x, weight, 1e-5),),
        "layer_norm": lambda x: (table.layer_norm(x, weight, bias, 1e-5),),
        "layer_norm without bias": lambda x: (table.layer_norm(x, weight, None, 1e-5),),
        "add_rms_norm": lambda x: table.add_rms_norm(x, x.flip(-1), weight, 1e-5),
        "add_layer_norm": lambda x: table.add_layer_norm(x, x.flip(-1), weight, bias, 1e-5),
        "add_layer_norm without bias": lambda x: table.add_layer_norm(x, x.flip(-1), weight, None, 1e-5),
    }


@pytest.mark.parametrize("dim", DIMS)
def test_norms(kernels: Elementwise, triton_device: torch.device, dtype: torch.dtype, dim: int) -> None:
    x = random(triton_device, 3, dim, dtype=dtype)
    for name, meant in norms(reference, dim, x).items():
        for found, expected in zip(norms(kernels, dim, x)[name](x), meant(x), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE[dtype], msg=lambda m, name=name: f"{name}: {m}")


def test_the_sum_is_rounded_before_it_is_normed(kernels: Elementwise, triton_device: torch.device) -> None:
    """The residual stream is 16-bit; norming the unrounded sum would differ from norming what the next layer sees."""
    x, residual, weight = (random(triton_device, 20, 64, dtype=torch.float16, seed=s) for s in range(3))
    out, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, kernels.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dim", (256, 70))
def test_a_row_depends_on_itself_alone(kernels: Elementwise, triton_device: torch.device, dim: int) -> None:
    x = random(triton_device, 7, dim)
    x[2] = float("nan")
    for name, norm in norms(kernels, dim, x).items():
        whole = norm(x)
        for at in (0, 1, 6):
            for alone, part in zip(norm(x[at : at + 1]), whole, strict=True):
                assert torch.equal(alone[0], part[at]), name


@pytest.mark.parametrize("num_heads", (1, 3))
def test_heads_of_a_wider_tensor(kernels: Elementwise, triton_device: torch.device, num_heads: int) -> None:
    """The queries' norm reads them out of the fused projection."""
    wide = random(triton_device, 5, num_heads * 64 + 32)
    x = wide[:, : num_heads * 64].unflatten(1, (num_heads, 64))
    weight = random(triton_device, 64, seed=1)
    found = kernels.rms_norm(x, weight, 1e-6)
    assert found.is_contiguous() and found.shape == x.shape
    torch.testing.assert_close(found, reference.rms_norm(x, weight, 1e-6), **CLOSE[torch.float32])
    torch.testing.assert_close(kernels.activation(x, "silu"), reference.activation(x, "silu"), **CLOSE[torch.float32])


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_activations(kernels: Elementwise, triton_device: torch.device, dtype: torch.dtype, name: str) -> None:
    x = random(triton_device, 2, 2 * 70, dtype=dtype)
    bent = reference.activation(x.double(), name).to(dtype)
    torch.testing.assert_close(kernels.activation(x, name), bent, **CLOSE[dtype])
    gated = kernels.gated_activation(x, name)
    # An activation one unit away makes a product one unit and its own rounding away.
    close = {"rtol": 2 * CLOSE[dtype]["rtol"], "atol": 2e-5}
    torch.testing.assert_close(gated, bent[:, :70] * x[:, 70:], **close)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_activations_of_extremes(kernels: Elementwise, triton_device: torch.device, name: str) -> None:
    x = torch.tensor([[0.0, 1e4, -1e4, 88.0, -88.0, 1e-20, float("nan")]], device=triton_device)
    expected = reference.activation(x.double(), name).float()
    torch.testing.assert_close(kernels.activation(x, name), expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_gated_activation_spans_programs(kernels: Elementwise, triton_device: torch.device) -> None:
    x = random(triton_device, 3, 2 * 1500 + 8)[:, : 2 * 1500]
    torch.testing.assert_close(kernels.gated_activation(x, "silu"), reference.gated_activation(x, "silu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", (1200, 64, 7))
@pytest.mark.parametrize("id_type", (torch.int64, torch.int32))
def test_gathers(kernels: Elementwise, triton_device: torch.device, id_type: torch.dtype, dim: int) -> None:
    table = random(triton_device, 11, dim, dtype=torch.bfloat16)
    ids = torch.tensor([10, 0, 3, 3], device=triton_device, dtype=id_type)
    expected = table.index_select(0, ids)
    assert torch.equal(kernels.embedding(ids, table), expected)
    assert torch.equal(kernels.lookup(ids, Matrix(table, 11, dim), torch.bfloat16), expected)
    values = torch.randint(-127, 128, (11, dim), dtype=torch.int8, device=triton_device)
    scaled = Matrix(values, 11, dim, random(triton_device, 11).abs())
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(kernels.lookup(ids, scaled, dtype), reference.lookup(ids, scaled, dtype))


def test_no_rows(kernels: Elementwise, triton_device: torch.device) -> None:
    x, weight = random(triton_device, 0, 64), random(triton_device, 64)
    assert kernels.rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert kernels.add_layer_norm(x, x, weight, weight, 1e-5)[1].shape == (0, 64)
    assert kernels.gated_activation(x, "silu").shape == (0, 32)
    assert kernels.embedding(torch.empty(0, dtype=torch.int64, device=triton_device), weight[None]).shape == (0, 64)
