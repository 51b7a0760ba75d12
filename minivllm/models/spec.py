"""A model as data: every number and choice in which the served decoders differ, and the names of its weights.

``ModelSpec`` is all that ``decoder.py`` knows of a model. An architecture's file (``architectures/``) reads it from a
``config.json`` and says under which names a checkpoint keeps the weights; it holds no computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.layers.norm import NormKind
from minivllm.layers.rope import RopeSpec


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model. Sizes are of the whole model, whatever number of ranks share it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # the longest context that the positions are meant for
    norm: NormKind
    norm_eps: float
    rope: RopeSpec | None  # None: learned positions
    activation: str
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None = sees everything
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: str | None  # what config.json says; None: it does not
    notes: tuple[str, ...] = ()  # what was decided while reading, one sentence each

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Weight:
    """Where a checkpoint tensor, or some rows of it, belongs in the decoder."""

    module: str  # path of the layer in the decoder
    part: str = ""  # which of a fused layer's tensors
    tensor: str = "weight"
    transposed: bool = False  # stored as [num_in, num_out]
    rows: tuple[int, int] | None = None  # of a fused checkpoint tensor (after transposing); None: all


@dataclass(frozen=True)
class WeightNames:
    """The tensors of a checkpoint. Whatever is neither in ``places`` nor ignored is an error, and so is a missing one."""

    places: Mapping[str, tuple[Weight, ...]]
    ignored: tuple[str, ...] = ()  # regular expressions of names that hold nothing to load
    optional_prefix: str = ""  # some checkpoints have it before every name, some do not


@dataclass(frozen=True)
class Blueprint:
    """What an architecture's file says of a model."""

    spec: ModelSpec
    names: WeightNames
