"""Normalisation, alone or fused with the addition before it (the residual stream is added to, then normed, at each block)."""

from typing import Literal

import torch
from torch import Tensor, nn

from minivllm.layers.setup import Setup
from minivllm.layers.source import TensorSource

NormKind = Literal["rms", "layer"]


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias. Every rank has it whole. Written at loading only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, setup: Setup, kind: NormKind, dim: int, eps: float) -> None:
        super().__init__()
        self.ops, self.kind, self.dim, self.eps = setup.ops, kind, dim, eps
        empty = torch.empty((2, dim), dtype=setup.dtype, device=setup.device)
        self.weight = nn.Parameter(empty[0].clone(), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(empty[1].clone(), requires_grad=False) if kind == "layer" else None)

    def tensors(self) -> tuple[tuple[str, str], ...]:
        """See ``Loadable``."""
        return (("", "weight"),) if self.bias is None else (("", "weight"), ("", "bias"))

    def shape(self, part: str, tensor: str) -> tuple[int, ...]:
        """See ``Loadable``."""
        return (self.dim,)

    def load(self, part: str, tensor: str, source: TensorSource) -> None:
        """See ``Loadable``."""
        self.get_parameter(tensor).copy_(source.read())

    def finish(self) -> None:
        """Nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm each row of ``x`` [..., dim]."""
        if self.kind == "rms":
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual`` and the sum; both [num_tokens, dim]."""
        if self.kind == "rms":
            return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
