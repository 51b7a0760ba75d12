"""Rung 3: continuous batching, with caches that are padded and stacked anew for every step.

Each request keeps a cache of its own, so a row may join or leave between any two steps: whoever is through makes room at once
for the next one. A step brings the caches of those that run together, calls the model once, and takes them apart again. On the
way in, what was request → layer → (keys, values) becomes layer → (keys, values) of the whole batch:

    request A   layer 0 (K, V)  layer 1 (K, V)  ...        layer 0   K [A; B; C]   V [A; B; C]
    request B   layer 0 (K, V)  layer 1 (K, V)  ...   →    layer 1   K [A; B; C]   V [A; B; C]
    request C   layer 0 (K, V)  layer 1 (K, V)  ...        ...

Shorter caches are padded to the longest, and the mask hides the padding. One thing is easily got wrong: the stacked cache has
as many columns as the longest row, but the new token of a shorter row does not stand at that position. It stands behind its own
last token. With the longest row's position for all, the model still writes fluent text, but another one.

What it costs: every step copies every cache, twice, to add one token to each. And a prompt still goes through the model alone,
while all that run wait. Rung 4 keeps K and V where they are, in blocks, and hands attention a list of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minivllm.learn.desk import Desk, Request
from minivllm.learn.model import KV, Model
from minivllm.learn.rectangle import greedy, places, rectangle


@dataclass
class Running:
    """A request that has a row, and its cache of one row. Written by ``decode``."""

    request: Request
    cache: KV

    @property
    def length(self) -> int:
        """Tokens whose keys and values are kept."""
        return int(self.cache[0][0].shape[2])


def serve(model: Model, desk: Desk, batch_size: int) -> None:
    """Serve with up to ``batch_size`` rows; a row that comes free is taken before the next step."""
    running: list[Running] = []
    while running or desk.open:
        newcomers = desk.take(batch_size - len(running), wait=not running)
        running += [prefill(model, desk, request) for request in newcomers]
        running = [row for row in running if not row.request.done]
        if running:
            decode(model, desk, running)
            running = [row for row in running if not row.request.done]


def prefill(model: Model, desk: Desk, request: Request) -> Running:
    """Compute a prompt, alone, and tell the first token."""
    logits, cache = model(rectangle([list(request.prompt)]), rectangle([list(range(len(request.prompt)))]))
    desk.tell(request, greedy(logits)[0])
    return Running(request, cache)


def decode(model: Model, desk: Desk, running: list[Running]) -> None:
    """Compute one token of every row in one call."""
    lengths = [row.length for row in running]
    stacked = stack([row.cache for row in running], lengths)
    model.meter.stacked(lengths)
    newest = rectangle([row.request.output[-1:] for row in running])
    positions = rectangle([[length] for length in lengths])  # each row's own: behind the tokens that it has
    mask = places([length + 1 for length in lengths], max(lengths) + 1)
    logits, grown = model(newest, positions, stacked, mask)
    for i, (row, token) in enumerate(zip(running, greedy(logits), strict=True)):
        first = max(lengths) - lengths[i]  # columns before it are padding
        row.cache = [(keys[i : i + 1, :, first:], values[i : i + 1, :, first:]) for keys, values in grown]
        desk.tell(row.request, token)


def stack(caches: list[KV], lengths: list[int]) -> KV:
    """The requests' caches as one, layer by layer, padded on the left to the longest."""
    longest = max(lengths)

    def batch(layer: int, kind: int) -> Tensor:  # kind: 0 keys, 1 values
        each = (F.pad(cache[layer][kind], (0, 0, longest - n, 0)) for cache, n in zip(caches, lengths, strict=True))
        return torch.cat(list(each))

    return [(batch(layer, 0), batch(layer, 1)) for layer in range(len(caches[0]))]
