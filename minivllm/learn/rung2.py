"""Rung 2: a static batch. Several requests go through the model side by side, from the first token to the last.

A call that computes eight tokens, one of each of eight requests, reads the weights once for all of them. While memory is what
a call waits for, that is eight tokens in the time of one. But a tensor is a rectangle:

* prompts are padded to the longest one, on the left, and the mask hides the empty columns from every other token;
* each row counts its positions from its own first token, not from the rectangle's edge;
* rows end at different times, and the rectangle cannot lose one: a finished row is computed along, its tokens thrown away,
  until the longest is through. Meanwhile the next requests wait outside.

What it costs is all of this padding. Rung 3 lets rows come and go.
"""

import torch

from minivllm.learn.desk import Desk, Request
from minivllm.learn.model import Model
from minivllm.learn.rectangle import greedy, places, rectangle


def serve(model: Model, desk: Desk, batch_size: int) -> None:
    """Serve batches of up to ``batch_size`` requests, each until its longest row ends."""
    while batch := desk.take(batch_size):
        _serve_batch(model, desk, batch)


def _serve_batch(model: Model, desk: Desk, batch: list[Request]) -> None:
    """One rectangle: all prompts in one call, then one token of every row a call."""
    prompts = [list(request.prompt) for request in batch]
    lengths = [len(prompt) for prompt in prompts]
    mask = places(lengths, max(lengths))
    logits, cache = model(rectangle(prompts), rectangle([list(range(n)) for n in lengths]), mask=mask)
    while True:
        tokens = greedy(logits)
        for request, token in zip(batch, tokens, strict=True):
            if not request.done:
                desk.tell(request, token)
        if all(request.done for request in batch):
            return
        # Each row goes on from its own length. A finished row's new column holds nothing that anybody looks at.
        positions = [[n + len(request.output) - 1] for n, request in zip(lengths, batch, strict=True)]
        mask = torch.cat((mask, torch.tensor([[not request.done] for request in batch])), dim=1)
        logits, cache = model(rectangle([[token] for token in tokens]), rectangle(positions), cache, mask)
