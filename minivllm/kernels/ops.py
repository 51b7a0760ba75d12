"""The table of ops that layers call: one frozen record of callables per way of computing.

A layer never imports a kernel; it is given a table. So another device, a faster kernel or the batch-invariant mode is another
table, and nothing else changes. The signatures are those of ``reference.py``, which says what each op means. Attention is not
in the table: it reads the paged cache in a way of its own, so a backend (``attention/``) is its unit of choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minivllm.kernels import few_shapes, invariant, reference
from minivllm.kernels.matrix import Matrix

if TYPE_CHECKING:
    from minivllm.kernels.cpu.library import NativeLibrary
    from minivllm.kernels.triton.chip import Chip

FEW_SHAPES = "torch, few shapes"


@dataclass(frozen=True)
class Ops:
    """One way of computing every op. Shapes and meanings: ``reference.py``."""

    name: str
    pack: Callable[[Tensor, Tensor | None], Matrix]
    linear: Callable[[Tensor, Matrix, Tensor | None], Tensor]
    logits: Callable[[Tensor, Matrix], Tensor]
    lookup: Callable[[Tensor, Matrix, torch.dtype], Tensor]
    embedding: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    activation: Callable[[Tensor, str], Tensor]
    gated_activation: Callable[[Tensor, str], Tensor]
    gated_linear: Callable[[Tensor, Matrix, Tensor | None, str], Tensor]
    choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    logprobs: Callable[[Tensor, Tensor, int], reference.RowLogprobs]
    rule_out: Callable[[Tensor, Tensor, Tensor], None]
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]
    native: "NativeLibrary | None" = None  # the compiled CPU kernels, where this table uses them
    chip: "Chip | None" = None  # the GPU that this table's Triton kernels are launched on, where it uses some


def reference_ops() -> Ops:
    """Plain torch, on any device."""
    return Ops(
        name="torch",
        pack=reference.pack,
        linear=reference.linear,
        logits=reference.logits,
        lookup=reference.lookup,
        embedding=reference.embedding,
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        layer_norm=reference.layer_norm,
        add_layer_norm=reference.add_layer_norm,
        rope=reference.rope,
        activation=reference.activation,
        gated_activation=reference.gated_activation,
        gated_linear=reference.gated_linear,
        choose=reference.choose,
        logprobs=reference.logprobs,
        rule_out=reference.rule_out,
        kv_write=reference.kv_write,
        copy_blocks=reference.copy_blocks,
    )


def few_shapes_ops() -> Ops:
    """Plain torch for 16-bit weights on a CPU, where every new shape of a product costs memory that stays."""
    gated = _two_ops(few_shapes.linear, reference.gated_activation)
    return replace(
        reference_ops(), name=FEW_SHAPES, linear=few_shapes.linear, logits=few_shapes.logits, gated_linear=gated
    )


def invariant_ops() -> Ops:
    """Plain torch in fixed shapes: each row's result is bitwise the same whatever else is in the batch.

    The other ops are so already: gathers and copies are exact, additions and products round each element alone, and a norm
    reduces each row by itself.
    """
    return replace(
        reference_ops(),
        name="torch, batch-invariant",
        linear=invariant.linear,
        logits=invariant.logits,
        activation=invariant.activation,
        gated_activation=invariant.gated_activation,
        gated_linear=_two_ops(invariant.linear, invariant.gated_activation),
    )


def native_ops(library: "NativeLibrary") -> Ops:
    """The compiled kernels for CPUs. They are batch-invariant as they are."""
    from minivllm.kernels.cpu.elementwise import Elementwise
    from minivllm.kernels.cpu.products import Products

    products, elementwise = Products(library), Elementwise(library)
    return replace(
        reference_ops(),
        name="native",
        pack=products.pack,
        linear=products.linear,
        logits=products.logits,
        lookup=products.lookup,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        layer_norm=elementwise.layer_norm,
        add_layer_norm=elementwise.add_layer_norm,
        rope=elementwise.rope,
        activation=elementwise.activation,
        gated_activation=elementwise.gated_activation,
        gated_linear=_two_ops(products.linear, elementwise.gated_activation),
        choose=elementwise.choose,
        native=library,
    )


def triton_ops(chip: "Chip", batch_invariant: bool) -> Ops:
    """Triton's kernels for ``chip``."""
    from minivllm.kernels.choices import load_choices
    from minivllm.kernels.triton.elementwise import Elementwise
    from minivllm.kernels.triton.fixed_tiles import FixedTiles
    from minivllm.kernels.triton.logprobs import Logprobs
    from minivllm.kernels.triton.masks import Masks
    from minivllm.kernels.triton.products import Products
    from minivllm.kernels.triton.sampling import Draw

    elementwise = Elementwise(chip)
    gated = elementwise.gated_activation
    table = replace(
        reference_ops(),
        lookup=elementwise.lookup,
        embedding=elementwise.embedding,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        layer_norm=elementwise.layer_norm,
        add_layer_norm=elementwise.add_layer_norm,
        activation=elementwise.activation,
        gated_activation=gated,
        choose=Draw(chip).choose,
        logprobs=Logprobs(chip).of,
        rule_out=Masks(chip).rule_out,
        chip=chip,
    )
    if batch_invariant:
        tiles = FixedTiles(chip, gated)
        return replace(
            table, name="triton, batch-invariant", linear=tiles.linear, logits=tiles.logits, gated_linear=tiles.gated_linear
        )
    products = Products(chip, load_choices(chip.name), gated)
    return replace(
        table,
        name="triton",
        pack=products.pack,
        linear=products.linear,
        logits=products.logits,
        gated_linear=products.gated_linear,
    )


def _two_ops(
    linear: Callable[[Tensor, Matrix, Tensor | None], Tensor], gated_activation: Callable[[Tensor, str], Tensor]
) -> Callable[[Tensor, Matrix, Tensor | None, str], Tensor]:
    """``gated_linear`` of a table that has no kernel for both at once."""

    def gated_linear(x: Tensor, matrix: Matrix, bias: Tensor | None, name: str) -> Tensor:
        return gated_activation(linear(x, matrix, bias), name)

    return gated_linear
