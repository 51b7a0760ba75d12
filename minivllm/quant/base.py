"""How a linear layer's weights are stored and applied: four verbs, one file a method.

A layer decides which rows and columns are its rank's; the method decides what is kept of them and how they are multiplied. The
module is only a place for the method's parameters. Name -> place of the class stands in ``METHODS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from minivllm.kernels.ops import Ops

METHODS: Mapping[str, str] = MappingProxyType({"none": "minivllm.quant.none:PlainWeights"})


@dataclass(frozen=True)
class LinearShape:
    """One rank's share of a linear."""

    num_out: int
    num_in: int
    dtype: torch.dtype
    device: torch.device


class LinearMethod(Protocol):
    """One way of storing weights. Holds nothing itself: what it keeps is on the layer's module."""

    name: str

    def create(self, module: nn.Module, shape: LinearShape) -> None:
        """Put empty parameters on ``module``."""

    def load(self, module: nn.Module, weight: Tensor, first_row: int) -> None:
        """Take ``weight`` [rows, num_in] in the checkpoint's precision as the rows from ``first_row`` on."""

    def finish(self, module: nn.Module) -> None:
        """All rows are there: pack, or do nothing."""

    def apply(self, module: nn.Module, x: Tensor, bias: Tensor | None, ops: Ops) -> Tensor:
        """Multiply ``x`` [num_tokens, num_in]: [num_tokens, num_out]."""


def linear_method(name: str) -> LinearMethod:
    """Make the method of this name; ``KeyError`` for a name that is not in ``METHODS``."""
    module, cls = METHODS[name].split(":")
    return cast(LinearMethod, getattr(import_module(module), cls)())
