"""What a model call costs on paper: floating-point operations and bytes, from sizes alone.

Two numbers decide how fast a call can be. Every token passes every matrix once (a multiplication and an addition for each
weight), and meets the K and V of every token that it sees. Every call reads all the weights, however few its tokens are, and
moves some of the cache. A machine does so many operations and moves so many bytes in a second; whichever takes longer is the
least time that the call can take (https://doi.org/10.1145/1498765.1498785, the roofline).

Left out, because they are small beside these: norms, activations, and what passes between layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings torch along, which a report does without
    from minivllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Sizes:
    """A model in the numbers that costs follow from."""

    layer_params: int  # weights of the matrices of all layers: a token passes each once
    head_params: int  # those of the head: only a token whose successor is wanted passes them
    pair_flops: int  # one query meets one key in one layer, all heads: a product for the score, one for the sum of values
    kv_layer_bytes: int  # K and V of one token in one layer
    windows: tuple[int | None, ...]  # of each layer
    itemsize: int  # bytes of a weight

    @staticmethod
    def of(spec: "ModelSpec", itemsize: int) -> "Sizes":
        """Count a model; ``itemsize`` is the bytes of a number in it."""
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention = spec.hidden_size * (heads + 2 * kv) + heads * spec.hidden_size
        mlp = spec.hidden_size * spec.intermediate_size * (3 if spec.gated_mlp else 2)
        return Sizes(
            layer_params=spec.num_layers * (attention + mlp),
            head_params=spec.vocab_size * spec.hidden_size,
            pair_flops=4 * heads,
            kv_layer_bytes=2 * kv * itemsize,
            windows=spec.windows,
            itemsize=itemsize,
        )

    @property
    def kv_bytes(self) -> int:
        """K and V of one token in all layers."""
        return self.kv_layer_bytes * len(self.windows)

    @property
    def weight_bytes(self) -> int:
        """What one call that gives logits reads of the weights."""
        return (self.layer_params + self.head_params) * self.itemsize


@dataclass(frozen=True)
class Cost:
    """One call of the model, or many added up."""

    calls: int = 0
    tokens: int = 0  # that the layers computed, padding included
    padding: int = 0  # of those, places that hold no token, or one of a request that has ended
    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0  # cache read, written or copied, padding included
    kv_padding_bytes: int = 0  # of those, for places that hold nothing

    @property
    def bytes_moved(self) -> int:
        """All bytes that pass between memory and the cores."""
        return self.weight_bytes + self.kv_bytes


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up."""
    rows = [(c.calls, c.tokens, c.padding, c.flops, c.weight_bytes, c.kv_bytes, c.kv_padding_bytes) for c in costs]
    return Cost(*map(sum, zip(*rows, strict=True))) if rows else Cost()


def step_cost(sizes: Sizes, rows: Iterable[tuple[int, int]], num_logits: int) -> Cost:
    """A step without padding: of each row (position of its first token, number of its tokens). Each token meets the tokens up
    to itself, within its layer's window; K and V of what a row sees are read once."""
    rows = list(rows)
    tokens = sum(count for _, count in rows)
    pairs = keys = 0
    for window in sizes.windows:
        for start, count in rows:
            pairs += sum(min(at + 1, window or at + 1) for at in range(start, start + count))
            keys += min(start + count, (window or start + count) + count - 1)
    logits = sizes.head_params * num_logits
    return Cost(
        calls=1,
        tokens=tokens,
        flops=2 * (sizes.layer_params * tokens + logits) + sizes.pair_flops * pairs,
        weight_bytes=(sizes.layer_params + (sizes.head_params if num_logits else 0)) * sizes.itemsize,
        kv_bytes=keys * sizes.kv_layer_bytes + tokens * sizes.kv_bytes,
    )
