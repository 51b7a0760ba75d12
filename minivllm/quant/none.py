"""Weights as they are: one matrix in the model's precision."""

import torch
from torch import Tensor, nn

from minivllm.kernels.ops import Ops
from minivllm.quant.base import LinearShape


class PlainWeights:
    """A ``weight`` [num_out, num_in] on the module. Holds nothing itself."""

    name = "none"

    def create(self, module: nn.Module, shape: LinearShape) -> None:
        """See ``LinearMethod``."""
        weight = torch.empty((shape.num_out, shape.num_in), dtype=shape.dtype, device=shape.device)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def load(self, module: nn.Module, weight: Tensor, first_row: int) -> None:
        """See ``LinearMethod``."""
        module.get_parameter("weight")[first_row : first_row + weight.shape[0]].copy_(weight)

    def finish(self, module: nn.Module) -> None:
        """Nothing to pack."""

    def apply(self, module: nn.Module, x: Tensor, bias: Tensor | None, ops: Ops) -> Tensor:
        """See ``LinearMethod``."""
        return ops.linear(x, module.get_parameter("weight"), bias)
