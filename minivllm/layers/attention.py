"""The attention block: project to q, k, v, turn by position, attend over the paged cache, project back."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minivllm.attention.base import Angles, AttnLayer, KVLayer, QKNorm
from minivllm.layers.linear import head_share, qkv_linear, row_linear
from minivllm.layers.norm import Norm
from minivllm.layers.setup import Setup


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, in numbers of the whole model (all ranks)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    qkv_bias: bool
    out_bias: bool
    qk_norm_eps: float | None  # None: q and k are not normed


class Attention(nn.Module):
    """One layer's attention. Written at loading only."""

    def __init__(self, setup: Setup, spec: AttentionSpec) -> None:
        super().__init__()
        self.setup = setup
        mine = head_share(spec.num_heads, spec.num_kv_heads, setup.comm)
        normed = spec.qk_norm_eps is not None
        self.q_norm = Norm(setup, "rms", spec.head_dim, spec.qk_norm_eps or 0.0) if normed else None
        self.k_norm = Norm(setup, "rms", spec.head_dim, spec.qk_norm_eps or 0.0) if normed else None
        norm = QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm and self.k_norm else None
        self.layer = AttnLayer(mine.num_heads, mine.num_kv_heads, spec.head_dim, spec.scale, spec.window, norm)
        heads = (spec.num_heads, spec.num_kv_heads)
        self.qkv = qkv_linear(setup, spec.hidden_size, heads, spec.head_dim, bias=spec.qkv_bias)
        self.out = row_linear(setup, spec.num_heads * spec.head_dim, spec.hidden_size, bias=spec.out_bias)

    def forward(self, x: Tensor, angles: Angles | None, plan: Any, cache: KVLayer) -> Tensor:
        """``x`` [num_tokens, hidden] -> the same shape. ``angles``: cos and sin of the tokens; ``plan``: the backend's."""
        heads = self.qkv(x).view(x.shape[0], -1, self.layer.head_dim)  # q, k and v side by side
        attended = self.setup.attention.run(plan, self.layer, heads, angles, cache)
        out: Tensor = self.out(attended.flatten(1))
        return out
