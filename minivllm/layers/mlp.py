"""The feed-forward block: up, a bend, down; gated (SwiGLU and kin) or plain."""

from torch import Tensor, nn

from minivllm.layers.linear import column_linear, row_linear
from minivllm.layers.setup import Setup


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)). Written at loading only. https://arxiv.org/abs/2002.05202."""

    def __init__(self, setup: Setup, hidden: int, intermediate: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = column_linear(setup, hidden, (("gate", intermediate), ("up", intermediate)), bias=bias)
        self.down = row_linear(setup, intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, hidden] -> the same shape."""
        out: Tensor = self.down(self.gate_up.gated(x, self.activation))
        return out


class PlainMLP(nn.Module):
    """down(activation(up(x))). Written at loading only."""

    def __init__(self, setup: Setup, hidden: int, intermediate: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.ops, self.activation = setup.ops, activation
        self.up = column_linear(setup, hidden, (("", intermediate),), bias=bias)
        self.down = row_linear(setup, intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, hidden] -> the same shape."""
        out: Tensor = self.down(self.ops.activation(self.up(x), self.activation))
        return out
