"""How a layer's weights are stored: three verbs, one file a method.

A layer decides which rows and columns are its rank's; the method decides what is kept of them, and at the end hands it all to
the table of kernels, which packs it into a ``Matrix``. From then on the layer works with that. The module is only a place for
the method's parameters. Name -> place of the class stands in ``METHODS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from minivllm.kernels.matrix import Matrix
from minivllm.kernels.ops import Ops

METHODS: Mapping[str, str] = MappingProxyType(
    {"none": "minivllm.quant.none:PlainWeights", "int8": "minivllm.quant.int8:Int8Weights"}
)


@dataclass(frozen=True)
class LinearShape:
    """One rank's share of a matrix."""

    num_out: int
    num_in: int
    dtype: torch.dtype
    device: torch.device


class LinearMethod(Protocol):
    """One way of storing weights. Holds nothing itself: what it keeps is on the layer's module."""

    name: str

    def create(self, module: nn.Module, shape: LinearShape) -> None:
        """Put parameters of zeros on ``module``."""

    def load(self, module: nn.Module, weight: Tensor, first_row: int) -> None:
        """Take ``weight`` [rows, num_in] in the checkpoint's precision as the rows from ``first_row`` on."""

    def finish(self, module: nn.Module, ops: Ops) -> Matrix:
        """All rows are there: pack them for ``ops``. The module's parameters become the packed tensors."""


def linear_method(name: str) -> LinearMethod:
    """Make the method of this name; ``KeyError`` for a name that is not in ``METHODS``."""
    module, cls = METHODS[name].split(":")
    return cast(LinearMethod, getattr(import_module(module), cls)())


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
