"""8-bit weights, made from any checkpoint while it is loaded (``--quantization int8``).

Every output keeps its own scale: the largest weight of its row becomes 127. The activations of a token are rounded to 8 bits
too, when a product needs them (``reference.int8_linear``), so a product is one of integers, and exact. A row is rounded on
arrival, so the model is never in memory at its full size. The vocabulary's table is stored like the linears.
"""

import torch
from torch import Tensor, nn

from minivllm.kernels.matrix import Matrix
from minivllm.kernels.ops import Ops
from minivllm.kernels.reference import quantize_rows
from minivllm.quant.base import LinearShape, frozen


class Int8Weights:
    """``weight`` int8 and ``scales`` float32 [num_out] on the module, and ``sums`` where the kernels want them."""

    name = "int8"

    def create(self, module: nn.Module, shape: LinearShape) -> None:
        """See ``LinearMethod``."""
        weight = torch.zeros((shape.num_out, shape.num_in), dtype=torch.int8, device=shape.device)
        module.register_parameter("weight", frozen(weight))
        module.register_parameter("scales", frozen(torch.zeros(shape.num_out, dtype=torch.float32, device=shape.device)))

    def load(self, module: nn.Module, weight: Tensor, first_row: int) -> None:
        """See ``LinearMethod``."""
        rows = slice(first_row, first_row + weight.shape[0])
        values, scales = quantize_rows(weight)
        module.get_parameter("weight")[rows].copy_(values)
        module.get_parameter("scales")[rows].copy_(scales)

    def finish(self, module: nn.Module, ops: Ops) -> Matrix:
        """See ``LinearMethod``."""
        matrix = ops.pack(module.get_parameter("weight").detach(), module.get_parameter("scales").detach())
        module.register_parameter("weight", frozen(matrix.values))
        if matrix.sums is not None:
            module.register_parameter("sums", frozen(matrix.sums))
        return matrix
