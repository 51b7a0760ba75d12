"""Rotary positions: which angles a position has. The rotation itself is an op (``kernels/reference.py``).

Channel pair i turns by ``position * theta ** (-2 i / rotary_dim)``. The variants stretch these frequencies so that a model can
read beyond the length it was first trained on:

* linear: all frequencies divided by ``factor`` (https://arxiv.org/abs/2306.15595);
* llama3: slow frequencies divided, fast ones kept, a ramp between (https://arxiv.org/abs/2407.21783);
* yarn: the same idea with a ramp by number of rotations, and longer vectors (https://arxiv.org/abs/2309.00071).

A table of all positions is made once: a step only looks up its rows, so the angles of a position are always the same bits.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """The numbers of one variant, as they stand in a config.json."""

    rotary_dim: int  # channels that are turned; the rest of each head passes unchanged
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn: the length of the first training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations over which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations under which a frequency is divided by factor
    attention_factor: float = 1.0  # yarn: scale of cos and sin
    truncate: bool = True  # yarn: round the ramp's ends to whole channels


def frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position of each channel pair: [rotary_dim / 2] float32."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return plain
    slow = plain / rope.factor
    if rope.kind == "linear":
        return slow
    if rope.kind == "llama3":
        waves = rope.original_max_positions / (2 * math.pi / plain)  # rotations within the first training's length
        kept = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        low, high = (_channel_of(rotations, rope) for rotations in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        channels = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
        kept = 1 - (channels - low) / (high - low if high != low else 0.001)
    kept = kept.clamp(0, 1)
    return slow * (1 - kept) + plain * kept


def _channel_of(rotations: float, rope: RopeSpec) -> float:
    """The channel pair (not rounded) that turns ``rotations`` times within the first training's length."""
    ratio = rope.original_max_positions / (rotations * 2 * math.pi)
    return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))


class RopeTable(nn.Module):
    """cos and sin of every position. Never written after it is made."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rope: RopeSpec, max_positions: int, device: torch.device) -> None:
        super().__init__()
        # Made on the CPU for every device: the same bits everywhere. (And torch.arange on a "meta" device imports the whole of
        # torch's compiler: 1.6 s of the time to the first token.)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies(rope)[None, :]
        self.register_buffer("cos", (angles.cos() * rope.attention_factor).to(device))  # [max_positions, rotary_dim / 2]
        self.register_buffer("sin", (angles.sin() * rope.attention_factor).to(device))  # float32, both

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of ``positions`` [num_tokens] int64: both [num_tokens, rotary_dim / 2] float32."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)
