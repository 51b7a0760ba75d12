"""The compiled norms, activations and rotations: the reference's values, and bits that depend on a row alone."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.cpu.elementwise import BENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place of a 16-bit result; for float32 sums may be in another order.
CLOSE = {
    torch.float32: {"rtol": 3e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 2e-6},
}
DIMS = (768, 70, 33, 16, 5)  # whole vectors, and what is left over on each kind of CPU


@pytest.fixture
def threads(native_table: Any) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of the compiled kernels; one again afterwards."""
    yield native_table.native.set_threads
    native_table.native.set_threads(1)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


def norms(table: Any, dim: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Each norm of a table as a function of its rows alone."""
    weight, bias = draw(dim, dtype=dtype, seed=1), draw(dim, dtype=dtype, seed=2)
    return {
        "rms_norm": lambda x: (table.rms_norm(x, weight, 1e-5),),
        "layer_norm": lambda x: (table.layer_norm(x, weight, bias, 1e-5),),
        "layer_norm without bias": lambda x: (table.layer_norm(x, weight, None, 1e-5),),
        "add_rms_norm": lambda x: table.add_rms_norm(x, x.flip(1), weight, 1e-5),
        "add_layer_norm": lambda x: table.add_layer_norm(x, x.flip(1), weight, bias, 1e-5),
        "add_layer_norm without bias": lambda x: table.add_layer_norm(x, x.flip(1), weight, None, 1e-5),
    }


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(native_table: Any, dtype: torch.dtype, dim: int) -> None:
    x = draw(9, dim, dtype=dtype)
    for name, meant in norms(reference, dim, dtype).items():
        for found, expected in zip(norms(native_table, dim, dtype)[name](x), meant(x), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE[dtype], msg=lambda m, name=name: f"{name}: {m}")


def test_the_sum_is_rounded_before_it_is_normed(native_table: Any) -> None:
    """The residual stream is 16-bit; norming the unrounded sum would differ from norming what the next layer sees."""
    x, residual, weight = (draw(50, 64, dtype=torch.bfloat16, seed=s) for s in range(3))
    for kind, bias in (("rms", ()), ("layer", (None,))):
        add, alone = getattr(native_table, f"add_{kind}_norm"), getattr(native_table, f"{kind}_norm")
        normed, total = add(x, residual, weight, *bias, 1e-5)
        assert torch.equal(total, x + residual) and torch.equal(normed, alone(total, weight, *bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_where_the_reference_rounds(native_table: Any, dtype: torch.dtype) -> None:
    """Twice, with the weight or the other half multiplied in between; once would change every third element."""
    x, weight = draw(50, 256, dtype=dtype), draw(256, dtype=dtype, seed=1)
    found = (native_table.rms_norm(x, weight, 1e-5), native_table.gated_activation(x, "silu"))
    expected = (reference.rms_norm(x, weight, 1e-5), reference.gated_activation(x, "silu"))
    for a, b in zip(found, expected, strict=True):
        assert (a == b).float().mean() > 0.99


def test_a_row_far_from_zero_keeps_its_digits(native_table: Any) -> None:
    x = draw(4, 96).mul_(0.01).add_(1000)
    weight = torch.ones(96)
    expected = reference.layer_norm(x.double(), weight.double(), None, 1e-5)  # float() inside: only the input is exact
    torch.testing.assert_close(native_table.layer_norm(x, weight, None, 1e-5).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(native_table: Any, dtype: torch.dtype, name: str) -> None:
    for dim in DIMS:
        x = draw(9, dim, dtype=dtype)
        torch.testing.assert_close(native_table.activation(x, name), reference.activation(x, name), **CLOSE[dtype])
        both = draw(9, 2 * dim, dtype=dtype)
        expected = reference.gated_activation(both, name)
        # The rounded activation may differ by one unit, and then the product does.
        tolerance = {**CLOSE[dtype], "rtol": 2 * CLOSE[dtype]["rtol"], "atol": 2e-5}
        torch.testing.assert_close(native_table.gated_activation(both, name), expected, **tolerance)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_over_the_whole_range(native_table: Any, name: str) -> None:
    """Against double precision: the exponential in all of them is good to about a unit, wherever the argument stands."""
    x = torch.cat((torch.linspace(-30, 30, 60_001), torch.linspace(-1e-3, 1e-3, 1001)))[None]
    found, expected = native_table.activation(x, name).double(), reference.activation(x.double(), name)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_at_the_edges(native_table: Any, name: str) -> None:
    edges = [torch.nan, -torch.inf, 0.0, 100.0, -100.0, 1e30, -1e30, 88.8, -88.8, 104.0, -104.0, 1e-40]
    edges += [] if name == "gelu" else [torch.inf]  # of which some of torch's versions make NaN
    x = torch.tensor([edges])
    found, expected = native_table.activation(x, name), reference.activation(x, name)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-35)


def test_the_names_are_the_references(native_table: Any) -> None:
    assert BENDS.keys() == reference.ACTIVATIONS.keys()


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (128, 64), (24, 12), (80, 16), (10, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(native_table: Any, dtype: torch.dtype, dim: int, half: int) -> None:
    x, angles = draw(7, 3, dim, dtype=dtype), draw(7, half)
    found, expected = (table.rope(x, angles.cos(), angles.sin()) for table in (native_table, reference))
    torch.testing.assert_close(found, expected, **CLOSE[dtype])
    assert torch.equal(found[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_wider_tensor(native_table: Any, dtype: torch.dtype) -> None:
    """The heads of q and k inside a fused projection, a slice of columns, and layouts that have to be copied first."""
    fused, weight, angles = draw(7, 8, 48, dtype=dtype), draw(48, dtype=dtype), draw(7, 24)
    columns = fused.view(7, -1)[:, 48:240]
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": lambda x: native_table.layer_norm(x, weight, None, 1e-5),
        "rope": lambda x: native_table.rope(x, angles.cos(), angles.sin()),
        "activation": lambda x: native_table.activation(x, "silu"),
    }
    for view, (name, op) in product((fused[:, 2:5], fused[:, :1], fused[:, 1::2], fused[:, :7].transpose(0, 1)), ops.items()):
        assert op(view).is_contiguous() and torch.equal(op(view), op(view.clone(memory_format=torch.contiguous_format))), name
    for view, op in product((columns, columns[:, ::2]), (native_table.activation, native_table.gated_activation)):
        assert torch.equal(op(view, "gelu"), op(view.contiguous(), "gelu"))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_its_batch(native_table: Any, threads: Any, dtype: torch.dtype, dim: int) -> None:
    x = draw(70 if dim < 768 else 130, dim, dtype=dtype)  # the longest rows are enough work to wake the threads
    ops = {
        **norms(native_table, dim, dtype),
        **{name: lambda x, name=name: (native_table.activation(x, name),) for name in reference.ACTIVATIONS},
    }
    for name, op in ops.items():
        threads(1)
        whole = op(x)
        for count in (2, 3):
            threads(count)
            assert all(map(torch.equal, op(x), whole)), (name, count)
        for rows in (slice(0, 1), slice(69, 70), slice(3, 40), slice(1, None)):
            for found, expected in zip(op(x[rows]), whole, strict=True):
                assert torch.equal(found, expected[rows]), (name, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_elements_bits_do_not_depend_on_its_place(native_table: Any, dtype: torch.dtype) -> None:
    x, cos, sin = draw(3, 70, dtype=dtype), draw(3, 35, seed=1), draw(3, 35, seed=2)
    for name in reference.ACTIVATIONS:
        expected = native_table.activation(x, name)
        gated = native_table.gated_activation(torch.cat((x, x.flip(0)), dim=1), name)
        for cut in (1, 2, 17, 35, 69):
            assert torch.equal(native_table.activation(x[:, cut:], name), expected[:, cut:]), (name, cut)
            pair = torch.cat((x[:, cut:], x.flip(0)[:, cut:]), dim=1)
            assert torch.equal(native_table.gated_activation(pair, name), gated[:, cut:]), (name, cut)
    turned = native_table.rope(x[:, None], cos, sin)[:, 0]
    for cut in (1, 3, 16, 30):
        kept = [*range(cut, 35), *range(35 + cut, 70)]
        assert torch.equal(native_table.rope(x[:, None, kept], cos[:, cut:], sin[:, cut:])[:, 0], turned[:, kept]), cut


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(native_table: Any, value: float) -> None:
    x = draw(5, 70)
    bad = x.clone()
    bad[2, 66] = value
    for name, op in norms(native_table, 70, torch.float32).items():
        for found, expected in zip(op(bad), op(x), strict=True):
            assert not found[2].isfinite().all(), name
            assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]]), name
