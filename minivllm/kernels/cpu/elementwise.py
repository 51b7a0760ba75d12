"""Norms, activations and rotary positions by the compiled kernels.

What torch does in five to ten calls over memory is one call here, so a step of a few rows does not drown in launches. The
meaning, and where values are rounded to their 16-bit type, is ``reference.py``'s; the sums are in another order.

A row's bits depend on that row alone. Inputs may be views into a wider tensor, as the parts of a fused projection are: any
distance from token to token, a token's own values side by side. Results are contiguous. Weights are of the input's type.
"""

from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

import torch
from torch import Tensor

from minivllm.kernels.cpu.library import KINDS, NativeLibrary

# Name in a config.json -> its number in native.cpp.
BENDS: Mapping[str, int] = MappingProxyType(
    {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3},
)


class Elementwise:
    """The elementwise ops of ``Ops``. Holds nothing that changes."""

    def __init__(self, library: NativeLibrary) -> None:
        self._norm, self._activation, self._rope = library.norm, library.activation, library.rope
        self._choose = library.choose
        # The structs of native.cpp, packed; as many arguments would take three times as long.
        self._norm_words, self._activation_words, self._rope_words = Struct("12qd").pack, Struct("8q").pack, Struct("10q").pack

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``."""
        return self._normed(x, weight, None, eps, centred=False)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See ``reference.layer_norm``."""
        return self._normed(x, weight, bias, eps, centred=True)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        return self._added(x, residual, weight, None, eps, centred=False)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``reference.add_layer_norm``."""
        return self._added(x, residual, weight, bias, eps, centred=True)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See ``reference.rope``."""
        x, num_tokens, num_heads, dim, stride = _by_token(x)
        cos, sin, out = cos.contiguous(), sin.contiguous(), _empty_like(x)
        tensors = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        self._rope(self._rope_words(*tensors, num_tokens, num_heads, dim, cos.shape[1], stride, KINDS[x.dtype]))
        return out

    def activation(self, x: Tensor, name: str) -> Tensor:
        """See ``reference.activation``."""
        x, num_tokens, num_heads, dim, stride = _by_token(x)
        out = _empty_like(x)
        shape = (num_tokens, num_heads * dim, stride)
        self._activation(self._activation_words(x.data_ptr(), out.data_ptr(), *shape, KINDS[x.dtype], BENDS[name], False))
        return out

    def gated_activation(self, x: Tensor, name: str) -> Tensor:
        """See ``reference.gated_activation``."""
        x, num_tokens, _, both, stride = _by_token(x)
        out = x.new_empty((num_tokens, both // 2))
        shape = (num_tokens, both // 2, stride)
        self._activation(self._activation_words(x.data_ptr(), out.data_ptr(), *shape, KINDS[x.dtype], BENDS[name], True))
        return out

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``reference.choose``."""
        logits = logits.contiguous()
        num_rows, vocab = logits.shape
        ids, finite = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
        self._choose(logits.data_ptr(), ids.data_ptr(), finite.data_ptr(), num_rows, vocab)
        return ids, finite

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool) -> Tensor:
        """A norm alone."""
        x, num_tokens, num_heads, dim, stride = _by_token(x)
        out = _empty_like(x)
        tensors = (x.data_ptr(), 0, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, out.data_ptr())
        self._norm(self._norm_words(*tensors, num_tokens, num_heads, dim, stride, KINDS[x.dtype], centred, eps))
        return out

    def _added(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """A norm of a sum, and the sum."""
        x, residual = x.contiguous(), residual.contiguous()
        (num_tokens, dim), total, out = x.shape, _empty_like(x), _empty_like(x)
        weights = (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        tensors = (x.data_ptr(), residual.data_ptr(), *weights, total.data_ptr(), out.data_ptr())
        self._norm(self._norm_words(*tensors, num_tokens, 1, dim, dim, KINDS[x.dtype], centred, eps))
        return out, total


def _empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape of ``x``; half the price of ``x.new_empty(x.shape)``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _by_token(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """``x`` [num_tokens, dim] or [num_tokens, num_heads, dim], as given if a token's values are side by side, else copied.

    With it num_tokens, num_heads (1), dim, and how many values lie from token to token.
    """
    if x.dim() == 3:
        (num_tokens, num_heads, dim), (stride, of_heads, of_values) = x.shape, x.stride()
        if of_values == 1 and of_heads == dim:
            return x, num_tokens, num_heads, dim, stride
        return x.contiguous(), num_tokens, num_heads, dim, num_heads * dim
    (num_tokens, dim), (stride, of_values) = x.shape, x.stride()
    return (x, num_tokens, 1, dim, stride) if of_values == 1 else (x.contiguous(), num_tokens, 1, dim, dim)
