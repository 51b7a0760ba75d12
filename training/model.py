"""The Llama architecture in plain torch: small enough to read in one sitting, and what the exported weights mean.

Sub-modules are named as the Hugging Face layout names weights (`model.layers.0.self_attn.q_proj.weight`), so that
`state_dict()` is the exported file. Rotation pairs feature i with feature i + head_dim/2, as that layout does.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    vocab_size: int = 4096
    dim: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 896
    max_tokens: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0  # only ever used in training; not part of the exported config


@dataclass
class KvCache:
    """Owned by the sampler: keys and values of every layer for a fixed batch, filled from the left."""

    keys: list[Tensor] = field(default_factory=list)  # a layer: [batch, kv_heads, max_time, head_dim]
    values: list[Tensor] = field(default_factory=list)
    num_filled: int = 0

    @classmethod
    def empty(cls, shape: ModelShape, batch: int, max_time: int, like: Tensor) -> "KvCache":
        def zeros() -> Tensor:
            return like.new_zeros(batch, shape.num_kv_heads, max_time, shape.head_dim)

        layers = range(shape.num_layers)
        return cls([zeros() for _ in layers], [zeros() for _ in layers])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, dim]
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention: several query heads share one key/value head, so the cache is smaller."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        q_dim, kv_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(shape.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(shape.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KvCache | None, layer: int) -> Tensor:
        batch, time, _ = x.shape

        def heads(y: Tensor) -> Tensor:  # [batch, heads, time, head_dim]
            return y.view(batch, time, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = rotate(heads(self.q_proj(x)), rope), rotate(heads(self.k_proj(x)), rope), heads(self.v_proj(x))
        if cache is not None:
            end = cache.num_filled + time
            cache.keys[layer][:, :, cache.num_filled : end] = k
            cache.values[layer][:, :, cache.num_filled : end] = v
            k, v = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        # With a cache the sampler feeds one token at a time, which may look at everything before it: no mask.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.mlp_dim, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.mlp_dim, bias=False)
        self.down_proj = nn.Linear(shape.mlp_dim, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, dim]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.dropout = shape.dropout
        self.input_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KvCache | None) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rope, cache, self.index))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Trunk(nn.Module):
    """Everything but the head; its own module only because the layout prefixes these weights with `model.`."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)


class Llama(nn.Module):
    """Owned by whoever trains it. Calling it gives logits; the head is the embedding matrix itself (tied)."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        cos, sin = rope_table(shape)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Normal(0, 0.02); what writes into the residual stream is scaled down so that depth adds no variance."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.shape.num_layers) ** 0.5 if writes_residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, ids: Tensor, cache: KvCache | None = None) -> Tensor:  # ids: [batch, time]
        start = 0 if cache is None else cache.num_filled
        positions = slice(start, start + ids.shape[1])
        x = self.model.embed_tokens(ids)  # [batch, time, dim]
        x = F.dropout(x, self.shape.dropout, self.training)
        rope = (self.rope_cos[positions], self.rope_sin[positions])  # type: ignore[index]
        for layer in self.model.layers:
            x = layer(x, rope, cache)
        if cache is not None:
            cache.num_filled += ids.shape[1]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)  # [batch, time, vocab]

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


def rope_table(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, both [max_tokens, head_dim]."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_tokens, dtype=torch.float64), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [batch, heads, time, head_dim]
    """Turn each pair of features (i, i + half) by its position's angle."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
