"""16-bit linears meet few shapes, whatever the number of rows."""

import pytest
import torch

from minivllm.kernels import few_shapes, reference


def test_a_step_of_any_size_has_one_of_few_shapes() -> None:
    sizes = [few_shapes.padded_rows(n) for n in range(1, 2049)]
    assert all(s >= n for n, s in enumerate(sizes, start=1))
    assert all(s - n < 64 for n, s in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 50


@pytest.mark.parametrize("num_rows", [1, 3, 5, 8, 127, 130, 200])
def test_padding_does_not_reach_the_result(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((num_rows, 64), (48, 64)))
    matrix = reference.pack(weight, None)
    found = few_shapes.linear(x, matrix, None)
    assert found.shape == (num_rows, 48)
    torch.testing.assert_close(found, reference.linear(x, matrix, None), rtol=0.02, atol=0.02)
    assert torch.equal(few_shapes.logits(x, matrix), found.float())
