"""The reference ops against float64 arithmetic written out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.kernels import reference
from minivllm.kernels.ops import Ops, few_shapes_ops, invariant_ops, reference_ops


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.double().numpy()


TABLES = {"reference": reference_ops(), "invariant": invariant_ops(), "few_shapes": few_shapes_ops()}


@pytest.fixture(params=[*TABLES, "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return TABLES.get(request.param) or request.getfixturevalue("native_table")


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear(ops: Ops, rows: int) -> None:
    x, w, b = draw(rows, 40), draw(24, 40, seed=1), draw(24, seed=2)
    m = ops.pack(w, None)
    assert (m.num_out, m.num_in) == (24, 40) and m.nbytes >= 24 * 40 * 4  # panels are filled up
    np.testing.assert_allclose(ops.linear(x, m, b).numpy(), wide(x) @ wide(w).T + wide(b), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ops.linear(x, m, None).numpy(), wide(x) @ wide(w).T, rtol=1e-4, atol=1e-4)
    assert torch.equal(ops.logits(x, m), ops.linear(x, m, None))
    assert torch.equal(ops.lookup(torch.tensor([3, 0, 3]), m, torch.float32), w[[3, 0, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear(ops: Ops, dtype: torch.dtype) -> None:
    """The definition in float64: both sides rounded to 8 bits by their rows' largest, the product exact."""
    x, w, b = draw(33, 40).to(dtype), draw(24, 40, seed=1), draw(24, seed=2).to(dtype)
    values, scales = reference.quantize_rows(w)
    m = ops.pack(values, scales)
    rounded, row_scales = [], []
    for row in wide(x):
        row_scales.append(abs(row).max() / 127)
        rounded.append(np.rint(row / row_scales[-1]))
    expected = np.array(rounded) @ wide(values).T * np.array(row_scales)[:, None] * wide(scales)
    rtol = 1e-5 if dtype == torch.float32 else 0.01
    np.testing.assert_allclose(wide(ops.linear(x, m, None)), expected, rtol=rtol, atol=1e-4)
    np.testing.assert_allclose(wide(ops.linear(x, m, b)), expected + wide(b), rtol=rtol, atol=0.01)
    assert abs(expected - wide(x) @ wide(w).T).max() < 0.3  # and it is near the product that was meant
    np.testing.assert_allclose(wide(ops.lookup(torch.tensor([7, 2]), m, torch.float32)), wide(w)[[7, 2]], atol=0.02)


def test_int8_rows_without_numbers(ops: Ops) -> None:
    values, scales = reference.quantize_rows(draw(5, 8))
    x = draw(4, 8)
    x[0, 3], x[1, 1], x[2] = torch.nan, torch.inf, 0.0
    found = ops.linear(x, ops.pack(values, scales), None)
    assert not found[0].isfinite().any() and not found[1].isfinite().any()
    assert torch.equal(found[2], torch.zeros(5)) and found[3].isfinite().all()

def test_rms_norm(ops: Ops) -> None:
    x, w, r = draw(7, 48), draw(48, seed=1), draw(7, 48, seed=2)
    y = wide(x)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * wide(w)
    np.testing.assert_allclose(ops.rms_norm(x, w, 1e-5).numpy(), expected, rtol=1e-5, atol=1e-5)
    normed, total = ops.add_rms_norm(x, r, w, 1e-5)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, ops.rms_norm(x + r, w, 1e-5))


def test_layer_norm(ops: Ops) -> None:
    x, w, b, r = draw(7, 48) + 3, draw(48, seed=1), draw(48, seed=3), draw(7, 48, seed=2)
    y = wide(x)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * wide(w)
    np.testing.assert_allclose(ops.layer_norm(x, w, b, 1e-5).numpy(), y + wide(b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ops.layer_norm(x, w, None, 1e-5).numpy(), y, rtol=1e-4, atol=1e-5)
    normed, total = ops.add_layer_norm(x, r, w, b, 1e-5)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, ops.layer_norm(x + r, w, b, 1e-5))


@pytest.mark.parametrize("half", [4, 3])
def test_rope_is_a_rotation_of_pairs(ops: Ops, half: int) -> None:
    x, angles = draw(5, 2, 8), draw(5, half, seed=1)
    out = ops.rope(x, angles.cos(), angles.sin())
    for t in range(5):
        for h in range(2):
            for i in range(half):
                turned = complex(x[t, h, i], x[t, h, half + i]) * complex(math.cos(angles[t, i]), math.sin(angles[t, i]))
                assert complex(out[t, h, i], out[t, h, half + i]) == pytest.approx(turned, abs=1e-5)
    assert torch.equal(out[..., 2 * half :], x[..., 2 * half :])


def test_activations(ops: Ops) -> None:
    x = draw(3, 50)
    y = wide(x)
    erf = np.vectorize(math.erf)
    expected = {
        "silu": y / (1 + np.exp(-y)),
        "gelu": y * (1 + erf(y / math.sqrt(2))) / 2,
        "gelu_new": 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "relu": np.maximum(y, 0),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(ops.activation(x, name).numpy(), values, rtol=1e-4, atol=1e-5)
        gated = ops.gated_activation(x, name).numpy()
        np.testing.assert_allclose(gated, values[:, :25] * y[:, 25:], rtol=1e-4, atol=1e-5)


def test_choose(ops: Ops) -> None:
    for vocab in (1, 7, 16, 33, 5000):
        logits = draw(9, vocab, seed=vocab).round(decimals=1)  # with ties
        ids, finite = ops.choose(logits)
        assert ids.tolist() == [int(np.argmax(row)) for row in logits.numpy()] and finite.all() and finite.dtype == torch.bool
    for value, at in ((math.nan, 0), (math.inf, 3), (-math.inf, 4999)):
        broken = draw(3, 5000)
        broken[1, at] = value
        assert ops.choose(broken)[1].tolist() == [True, False, True]
    masked = draw(2, 40)
    masked[0, :] = -torch.inf
    masked[0, 39] = -3e38
    assert ops.choose(masked)[0].tolist() == [39, int(masked[1].argmax())]
    assert ops.choose(draw(0, 40))[0].shape == (0,)


def test_embedding_kv_write_and_copy(ops: Ops) -> None:
    table = draw(9, 4)
    assert torch.equal(ops.embedding(torch.tensor([3, 0, 3]), table), table[[3, 0, 3]])
    k_cache, v_cache = torch.zeros(4, 2, 1, 3), torch.zeros(4, 2, 1, 3)
    k, v = draw(2, 1, 3), draw(2, 1, 3, seed=1)
    ops.kv_write(k, v, k_cache, v_cache, torch.tensor([5, 2]))
    assert torch.equal(k_cache[2, 1], k[0]) and torch.equal(k_cache[1, 0], k[1])
    assert torch.equal(v_cache[2, 1], v[0]) and torch.equal(v_cache[1, 0], v[1])
    assert int((k_cache != 0).sum()) == 6
    before = k_cache.clone()
    ops.copy_blocks(k_cache, torch.tensor([2, 1]), torch.tensor([1, 3]))  # block 1 is read before it is overwritten
    assert torch.equal(k_cache[1], before[2]) and torch.equal(k_cache[3], before[1])


@pytest.mark.parametrize("window", [None, 3])
def test_attention_written_out(window: int | None) -> None:
    q, k, v = draw(4, 4, 6), draw(9, 2, 6, seed=1), draw(9, 2, 6, seed=2)
    found = reference.attention(q, k, v, 5, 0.4, window)
    for i in range(4):
        low = 0 if window is None else max(0, 5 + i - window + 1)
        for h in range(4):
            keys, values = wide(k)[low : 5 + i + 1, h // 2], wide(v)[low : 5 + i + 1, h // 2]
            weights = np.exp(keys @ wide(q)[i, h] * 0.4)
            np.testing.assert_allclose(found[i, h].numpy(), weights @ values / weights.sum(), rtol=1e-4, atol=1e-5)
