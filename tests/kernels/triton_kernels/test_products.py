"""Products in Triton: float64's values whatever the kernel and its tiles; fixed tiles give a row its own bits."""

import pytest
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.choices import LIBRARY, ROW_BUCKETS, ChoiceTable, ProductChoice, ProductKey
from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton import fixed_tiles, products
from minivllm.kernels.triton.chip import this_chip
from minivllm.kernels.triton.fixed_tiles import FixedTiles, Tile
from minivllm.kernels.triton.products import Products

# kernel, block_m, block_n, block_k, split_k, warps, stages, ahead
DOT, VECTOR = ProductChoice("dot", 16, 16, 32, 1, 4, 2), ProductChoice("vector", 1, 16, 32, 1, 4, 2)
CHOICES = {
    "dot": DOT,
    "dot of 32": ProductChoice("dot", 32, 32, 16, 1, 4, 3),
    "dot ahead": ProductChoice("dot", 16, 16, 32, 1, 4, 2, ahead=64),
    "dot split": ProductChoice("dot", 16, 16, 16, 3, 4, 2),
    "dot split ahead": ProductChoice("dot", 16, 16, 16, 2, 4, 2, ahead=32),
    "vector": VECTOR,
    "vector of 2": ProductChoice("vector", 2, 16, 32, 1, 4, 2),
    "vector split": ProductChoice("vector", 2, 16, 16, 2, 4, 2, ahead=32),
}
SHAPES = [(48, 64), (37, 100)]  # (num_out, num_in): whole tiles, parts of them


@pytest.fixture
def dtypes(triton_device: torch.device) -> list[torch.dtype]:
    """The interpreter gets 16-bit products wrong."""
    return [torch.float32] if triton_device.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def weights(device: torch.device, num_out: int, num_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Such that products are about as large as one."""
    return (draw(device, num_out, num_in, seed=1) / 8).to(dtype)


def exact_linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    exact = x.double() @ matrix.values.double().t()
    return exact if bias is None else exact + bias.double()


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """``found`` is ``exact`` up to the rounding of its type and some of float32's."""
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=2e-5)


@pytest.fixture
def ours(triton_device: torch.device) -> Products:
    return Products(this_chip(triton_device), ChoiceTable("none"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_linear_is_the_product(
    triton_device: torch.device, ours: Products, dtypes: list[torch.dtype], choice: ProductChoice, shape: tuple[int, int]
) -> None:
    for dtype in dtypes:
        matrix = ours.pack(weights(triton_device, *shape, dtype), None)
        bias = draw(triton_device, shape[0], dtype=dtype, seed=2)
        plan = ours.plan_as(choice, matrix)
        for num_rows in {1, min(2, choice.block_m), choice.block_m * 3 // 4}:
            if num_rows == 0:
                continue
            x = draw(triton_device, num_rows, shape[1], dtype=dtype)
            for bias_or_none in (None, bias):
                exact = exact_linear(x, matrix, bias_or_none)
                assert_rounded(ours.run(plan, x, matrix, bias_or_none, dtype), exact)
                assert_rounded(ours.run(plan, x, matrix, bias_or_none, torch.float32), exact)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("choice", [DOT, CHOICES["dot split"], CHOICES["vector split"]], ids=["dot", "split", "vector"])
def test_gated_linear_is_the_product_and_its_activation(
    triton_device: torch.device, ours: Products, dtypes: list[torch.dtype], choice: ProductChoice, name: str
) -> None:
    for dtype in dtypes:
        matrix = ours.pack(weights(triton_device, 2 * 40, 100, dtype), None)
        bias = draw(triton_device, 2 * 40, dtype=dtype, seed=2)
        plan = ours.plan_as(choice, matrix, name)
        x = draw(triton_device, min(choice.block_m, 5), 100, dtype=dtype)
        for bias_or_none in (None, bias):
            found = ours.run(plan, x, matrix, bias_or_none, dtype)
            expected = reference.gated_activation(exact_linear(x, matrix, bias_or_none), name)
            step = 4 * torch.finfo(dtype).eps  # three roundings, and what the first does to an activation's slope
            torch.testing.assert_close(found.double(), expected, rtol=step, atol=max(step, 2e-5))


def test_a_table_decides_and_a_rule_decides_the_rest(triton_device: torch.device, dtypes: list[torch.dtype]) -> None:
    chip, dtype = this_chip(triton_device), dtypes[0]
    name = str(dtype).removeprefix("torch.")
    table = ChoiceTable(
        chip.name,
        {
            ProductKey("linear", name, 48, 64, 2): CHOICES["vector of 2"],
            ProductKey("linear", name, 48, 64, 4): DOT,
            ProductKey("logits", name, 48, 64, 1): VECTOR,
            ProductKey("gated_linear", name, 48, 64, 8): CHOICES["dot split"],
            ProductKey("linear", name, 48, 64, 8): LIBRARY,
        },
    )
    ours = Products(chip, table)
    matrix = ours.pack(weights(triton_device, 48, 64, dtype), None)
    for _ in range(2):  # decided, and remembered
        for num_rows in (0, 1, 2, 3, 5, 9, 64, 128, 129):
            x = draw(triton_device, num_rows, 64, dtype=dtype)
            exact = exact_linear(x, matrix, None)
            assert_rounded(ours.linear(x, matrix, None), exact)
            logits = ours.logits(x, matrix)
            assert logits.dtype == torch.float32
            assert_rounded(logits, exact)
            assert_rounded(ours.gated_linear(x, matrix, None, "relu"), reference.gated_activation(exact, "relu"))
    launched = {key[:3]: plan is not None for key, plan in ours._plans.items()}
    assert launched["linear", "", 2] and launched["linear", "", 4] and not launched["linear", "", 8]
    assert launched["logits", "", 1] and not launched["logits", "", 4]
    assert launched["gated_linear", "relu", 8] and not launched["gated_linear", "relu", 2]


def test_what_is_not_asked_for_is_neither_read_nor_written(triton_device: torch.device, ours: Products) -> None:
    """Views with rows apart, and not a number in all that lies between and behind."""
    matrix = ours.pack(weights(triton_device, 37, 100), None)
    wide = torch.full((9, 160), float("nan"), device=triton_device)
    wide[:5, 32:132] = draw(triton_device, 5, 100)
    x = wide[:5, 32:132]
    for choice in (DOT, CHOICES["dot split"]):
        assert_rounded(ours.run(ours.plan_as(choice, matrix), x, matrix, None, torch.float32), exact_linear(x, matrix, None))
    assert_rounded(FixedTiles(this_chip(triton_device)).linear(x, matrix, None), exact_linear(x, matrix, None))
    across = draw(triton_device, 100, 5).t()
    plan = ours.plan_as(DOT, matrix)
    assert_rounded(ours.run(plan, across, matrix, None, torch.float32), exact_linear(across, matrix, None))
    with pytest.raises(ValueError, match="99 columns"):
        ours.run(plan, x[:, :99], matrix, None, torch.float32)


def test_a_split_product_can_be_launched_again(triton_device: torch.device, ours: Products) -> None:
    """Its counters are back at zero, and its sums are added in the same order whoever came last."""
    matrix = ours.pack(weights(triton_device, 64, 96), None)
    plan, x = ours.plan_as(CHOICES["dot split"], matrix), draw(triton_device, 7, 96)
    first = ours.run(plan, x, matrix, None, torch.float32)
    for _ in range(3 if triton_device.type == "cpu" else 50):
        assert torch.equal(ours.run(plan, x, matrix, None, torch.float32), first)


def test_int8_goes_the_way_of_the_reference(triton_device: torch.device, ours: Products) -> None:
    values, scales = reference.quantize_rows(weights(triton_device, 32, 64))
    matrix, x = ours.pack(values, scales), draw(triton_device, 19, 64)
    for table in (ours, FixedTiles(this_chip(triton_device))):
        assert torch.equal(table.linear(x, matrix, None), reference.linear(x, matrix, None))
        assert torch.equal(table.logits(x, matrix), reference.logits(x, matrix))
        assert torch.equal(table.gated_linear(x, matrix, None, "silu"), reference.gated_linear(x, matrix, None, "silu"))
    ids = torch.tensor([3, 31, 3], device=triton_device)
    assert torch.equal(ours.lookup(ids, matrix, torch.float32), reference.lookup(ids, matrix, torch.float32))


def test_the_rule_gives_sizes_that_fit() -> None:
    for op, gated in (("linear", 1), ("gated_linear", 2)):
        for num_out in (1024, 3072, 4096, 14336, 128256, 151936, 1000):
            for num_in in (512, 1024, 3072, 4096, 14336, 100):
                for num_rows in ROW_BUCKETS:
                    choice = products.rule(ProductKey(op, "bfloat16", num_out * gated, num_in, num_rows), 132)
                    if choice == LIBRARY:
                        continue
                    assert num_rows <= choice.block_m and num_out % choice.block_n == 0
                    assert num_in % (choice.block_k * choice.split_k) == 0
                    assert choice.ahead * choice.split_k <= num_in and choice.ahead % 8 == 0
                    assert (choice.block_m + gated * choice.block_n) * choice.block_k * 2 * choice.stages <= 160 * 1024
    assert products.rule(ProductKey("linear", "float32", 4096, 1024, 1), 132) == LIBRARY


@pytest.mark.parametrize("shape", [(100, 72), (48, 100)], ids=str)
def test_fixed_tiles_are_the_product(triton_device: torch.device, dtypes: list[torch.dtype], shape: tuple[int, int]) -> None:
    tiles = FixedTiles(this_chip(triton_device))
    for dtype in dtypes:
        matrix = reference.pack(weights(triton_device, *shape, dtype), None)
        bias = draw(triton_device, shape[0], dtype=dtype, seed=2)
        for num_rows in (0, 1, 70):
            x = draw(triton_device, num_rows, shape[1], dtype=dtype)
            assert_rounded(tiles.linear(x, matrix, bias), exact_linear(x, matrix, bias))
            logits = tiles.logits(x, matrix)
            assert logits.dtype == torch.float32
            assert_rounded(logits, exact_linear(x, matrix, None))
            found, expected = tiles.gated_linear(x, matrix, bias, "silu"), exact_linear(x, matrix, bias)
            step = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                found.double(), reference.gated_activation(expected, "silu"), rtol=step, atol=max(step, 2e-5)
            )


def test_bits_of_a_row_depend_on_it_alone(triton_device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Whatever the number of rows, its place and its neighbours, which decide about the size of the tiles."""
    on_gpu = triton_device.type == "cuda"
    num_out, num_in, total = (1024, 512, 5000) if on_gpu else (64, 96, 75)
    tiles = FixedTiles(this_chip(triton_device))
    for dtype in dtypes:
        matrix = reference.pack(weights(triton_device, num_out, num_in, dtype), None)
        x = draw(triton_device, total, num_in, dtype=dtype)
        plain, logits = tiles.linear(x, matrix, None), tiles.logits(x, matrix)
        gated = tiles.gated_linear(x, matrix, None, "silu")
        cuts = ((0, 1), (74, 75), (3, 67), (1, 74), *(((5, 300), (700, 1900), (4000, 5000)) if on_gpu else ()))
        for start, end in cuts:
            part = x[start:end].clone()
            assert torch.equal(tiles.linear(part, matrix, None), plain[start:end])
            assert torch.equal(tiles.gated_linear(part, matrix, None, "silu"), gated[start:end])
            assert torch.equal(tiles.logits(part, matrix), logits[start:end])


def test_the_size_of_a_tile_changes_no_bit(triton_device: torch.device) -> None:
    if triton_device.type == "cpu":
        pytest.skip("one tile serves the interpreter's float32")
    tiles = FixedTiles(this_chip(triton_device))
    for dtype in (torch.bfloat16, torch.float16):
        matrix = reference.pack(weights(triton_device, 1040, 1000, dtype), None)
        x = draw(triton_device, 200, 1000, dtype=dtype)
        found = [tiles.multiply_in(tile, x, matrix) for tile in fixed_tiles.TILES]
        gated = [tiles.multiply_in(tile, x, matrix, None, "silu") for tile in fixed_tiles.TILES[:-1]]
        assert all(torch.equal(other, found[0]) for other in found)
        assert all(torch.equal(other, gated[0]) for other in gated)


def test_tiles_shrink_until_they_fill_the_chip() -> None:
    def tile(num_rows: int, num_out: int, gated: bool = False) -> Tile:
        return fixed_tiles.tile_for(num_rows, num_out, torch.bfloat16, gated=gated, num_sms=132)

    assert tile(8192, 4096) == fixed_tiles.TILES[0]
    assert tile(1, 1024) == fixed_tiles.TILES[-1]
    assert tile(1, 1024, gated=True) == fixed_tiles.TILES[-2]
    sizes = [tile(n, 3072).block_m * tile(n, 3072).block_n for n in (1, 64, 128, 256, 512, 2048)]
    assert sizes == sorted(sizes)
    assert fixed_tiles.tile_for(4096, 4096, torch.float32, gated=False, num_sms=132) == fixed_tiles.FLOAT32_TILE
