"""Rung 0: no cache. For every token the whole text goes through the model again.

A language model is a function from a text to what may follow it, so this is the plainest way to use one: compute, choose a
token, append it, compute again. It is right, and everything above it is only faster.

What it costs: a text of n tokens is computed n times over, each time one token longer. The first prompt token of a request with
50 output tokens passes the model 50 times and gives the same keys and values each time. Rung 1 keeps them.
"""

from minivllm.learn.desk import Desk
from minivllm.learn.model import Model
from minivllm.learn.rectangle import greedy, rectangle


def serve(model: Model, desk: Desk, batch_size: int) -> None:
    """Serve one request after the other; ``batch_size`` is of no use yet."""
    while found := desk.take(1):
        request = found[0]
        while not request.done:
            text = request.text
            logits, _ = model(rectangle([text]), rectangle([list(range(len(text)))]), keep=False)
            desk.tell(request, greedy(logits)[0])
