"""Weights as they are, in the model's precision."""

import torch
from torch import Tensor, nn

from minivllm.kernels.matrix import Matrix
from minivllm.kernels.ops import Ops
from minivllm.quant.base import LinearShape, frozen


class PlainWeights:
    """A ``weight`` on the module, [num_out, num_in] until it is packed. Holds nothing itself."""

    name = "none"

    def create(self, module: nn.Module, shape: LinearShape) -> None:
        """See ``LinearMethod``."""
        weight = torch.zeros((shape.num_out, shape.num_in), dtype=shape.dtype, device=shape.device)
        module.register_parameter("weight", frozen(weight))

    def load(self, module: nn.Module, weight: Tensor, first_row: int) -> None:
        """See ``LinearMethod``."""
        module.get_parameter("weight")[first_row : first_row + weight.shape[0]].copy_(weight)

    def finish(self, module: nn.Module, ops: Ops) -> Matrix:
        """See ``LinearMethod``."""
        matrix = ops.pack(module.get_parameter("weight").detach(), None)
        module.register_parameter("weight", frozen(matrix.values))
        return matrix
