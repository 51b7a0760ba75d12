"""Activations, for the kernels that apply them on the way."""

import triton
import triton.language as tl


@triton.jit
def bend(x, NAME: tl.constexpr):
    """The activation called ``NAME`` (``reference.ACTIVATIONS``) of ``x``, in float32."""
    if NAME == "silu" or NAME == "swish":
        bent = x / (1.0 + tl.exp(-x))
    elif NAME == "relu":
        bent = tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif NAME == "gelu":
        bent = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(NAME == "gelu_new" or NAME == "gelu_pytorch_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        bent = x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 x (1 + tanh(inner))
    return bent
