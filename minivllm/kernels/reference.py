"""The meaning of every op, in a few lines of plain torch.

Nothing here is clever: a faster version (``cpu/``, ``triton/``) has the same signature and is tested against this file. These
versions run on any device that torch knows, so a new device works before it is fast.

Norms and rotations compute in float32 whatever the precision of their input and round once at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from minivllm.kernels.matrix import Matrix
from minivllm.types import ANY_TOKEN, BY_BITS


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Look up ``ids`` [num_tokens] in ``table`` [num_rows, dim]: [num_tokens, dim]."""
    return table.index_select(0, ids)


def pack(values: Tensor, scales: Tensor | None) -> Matrix:
    """Take the weights ``values`` [num_out, num_in]; int8 ones times ``scales`` [num_out] float32. Here: just as they are."""
    return Matrix(values, values.shape[0], values.shape[1], scales)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """``x`` [num_tokens, num_in] times ``matrix`` [num_out, num_in] transposed, plus ``bias`` [num_out]."""
    if matrix.scales is None:
        return F.linear(x, matrix.values, bias)
    return int8_linear(x, matrix.values, matrix.scales, bias)


def logits(x: Tensor, matrix: Matrix) -> Tensor:
    """``linear`` for the head of the model: [num_rows, num_out] float32."""
    return linear(x, matrix, None).float()


def lookup(ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` [num_tokens] of ``matrix``: [num_tokens, num_in] in ``dtype``."""
    rows = matrix.values.index_select(0, ids)
    if matrix.scales is None:
        return rows
    return (rows.float() * matrix.scales.index_select(0, ids)[:, None]).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of ``x`` [num_rows, dim] as int8 [num_rows, dim] times a scale [num_rows] float32: its largest becomes 127."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (wide * inverse[:, None]).round().to(torch.int8), largest / 127.0


def int8_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear in 8-bit integers (w8a8): weights rounded per output, activations per token as they come, sums exact in int32.

    Scales as in https://arxiv.org/abs/2206.01861. A row that holds no number (NaN, infinity) gives none.
    """
    rounded, row_scales = quantize_rows(x)
    sums = torch._int_mm(rounded, values.t()) if x.device.type == "cpu" else rounded.double() @ values.double().t()
    wide = sums.float() * row_scales[:, None] * scales
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of ``x`` [..., dim] to root mean square 1, then by ``weight`` [dim]. https://arxiv.org/abs/1910.07467."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(x + residual)`` and the sum, which is the next residual; both [num_tokens, dim]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Shift and scale each row of ``x`` [..., dim] to mean 0 and variance 1, then by ``weight`` and ``bias`` [dim]."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = normed * weight.float()
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``layer_norm(x + residual)`` and the sum, which is the next residual; both [num_tokens, dim]."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of the first ``2 * half`` channels of each head by the token's angles.

    ``x`` [num_tokens, num_heads, head_dim]; ``cos`` and ``sin`` [num_tokens, half] float32. Channels beyond ``2 * half`` pass
    unchanged (partial rotary). https://arxiv.org/abs/2104.09864, in the half-split order of the Llama checkpoints.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def _gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


# Name in a config.json -> function.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_new": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "relu": F.relu,
    }
)


def activation(x: Tensor, name: str) -> Tensor:
    """Apply the function called ``name`` to each element."""
    return ACTIVATIONS[name](x)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """``x`` [num_tokens, 2 * dim] holds gate and up side by side: activation(gate) * up, [num_tokens, dim]."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, name) * up


def gated_linear(x: Tensor, matrix: Matrix, bias: Tensor | None, name: str) -> Tensor:
    """``linear`` with a matrix that holds gate above up, then ``gated_activation``: [num_tokens, num_out / 2]."""
    return gated_activation(linear(x, matrix, bias), name)


def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of ``logits`` [num_rows, vocab] float32 the most likely token [num_rows] int64, the lowest among equals, and
    whether all of its numbers are finite [num_rows] bool."""
    low, high = torch.aminmax(logits, dim=-1)
    return logits.argmax(dim=-1), low.isfinite() & high.isfinite()


@dataclass(frozen=True)
class RowLogprobs:
    """What is known of the chosen and the likeliest tokens of rows."""

    logprobs: Tensor  # [num_rows] float32: of the chosen token
    ranks: Tensor  # [num_rows] int32: 1 for the likeliest; tokens as likely as the chosen one are not ahead of it
    top_ids: Tensor  # [num_rows, num_top] int32: likeliest first, equals in the order of their ids
    top_logprobs: Tensor  # [num_rows, num_top] float32


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> RowLogprobs:
    """Logprobs of ``chosen`` [num_rows] int64 and of the ``num_top`` likeliest tokens under ``logits`` [num_rows, vocab]
    float32."""
    mine = logits.gather(1, chosen[:, None])
    norm = logits.logsumexp(-1, keepdim=True)
    ranks = 1 + (logits > mine).sum(1, dtype=torch.int32)
    best = logits.sort(dim=-1, descending=True, stable=True)
    top = best.values[:, :num_top] - norm
    return RowLogprobs((mine - norm)[:, 0], ranks, best.indices[:, :num_top].to(torch.int32), top)


def rule_out(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set logits [n, vocab] float32 to minus infinity where the mask of their row lets no token come; ``rows`` [n] integers.

    ``masks`` [rows, 1 + ceil(vocab / 32)] int32: what the first word says (``types.ANY_TOKEN``); of those behind it, bit t % 32
    of word t // 32 is set when token t may come.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    for place, row in enumerate(rows.tolist()):  # row by row: spread out, a mask is as large as the logits
        says = int(masks[row, 0])
        if says == BY_BITS:
            bits = (masks[row, 1:, None] >> shifts) & 1  # [words, 32]
            logits[place].masked_fill_(bits.view(-1)[: logits.shape[1]] == 0, -torch.inf)
        elif says != ANY_TOKEN:
            kept = logits[place, says].clone()
            logits[place].fill_(-torch.inf)
            logits[place, says] = kept


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Put ``k`` and ``v`` [num_tokens, num_kv_heads, head_dim] into the KV slots ``slots`` [num_tokens] of the caches.

    The caches are [num_blocks, block_size, num_kv_heads, head_dim]; slot = block * block_size + offset.
    """
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v.to(v_cache.dtype))


def copy_blocks(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks ``src`` [n] to ``dst`` [n] of one cache tensor; all sources are read before any is written."""
    cache.index_copy_(0, dst, cache.index_select(0, src))


def attention(q: Tensor, k: Tensor, v: Tensor, first_position: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of one sequence, the definition: softmax(q k^T * scale) v, in float32.

    ``q`` [num_queries, num_heads, head_dim] are the tokens from ``first_position`` on; ``k`` and ``v`` [num_keys, num_kv_heads,
    head_dim] are the tokens from position 0 on. Query head h reads KV head h // (num_heads / num_kv_heads). With a ``window``
    w, the query at p sees the keys p - w + 1 .. p.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    at = torch.arange(q.shape[0], device=q.device)[:, None] + first_position
    key_at = torch.arange(k.shape[0], device=q.device)[None, :]
    hidden = (key_at > at) if window is None else (key_at > at) | (key_at <= at - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
