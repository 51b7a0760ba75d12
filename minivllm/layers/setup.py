"""What every layer is built with: how to compute, how weights are stored, who shares the work, where and in what precision."""

from dataclasses import dataclass

import torch

from minivllm.attention.base import AttentionBackend
from minivllm.kernels.ops import Ops
from minivllm.parallel.comm import Comm
from minivllm.quant.base import LinearMethod


@dataclass(frozen=True)
class Setup:
    """The arguments that all layers of a model have in common."""

    ops: Ops
    comm: Comm
    method: LinearMethod
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device
