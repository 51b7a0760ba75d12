"""Rung 1: the KV cache, one request at a time.

In attention a new token compares its query with the keys of all tokens before it and sums their values. Keys and values of a
token depend on what stands before it and on nothing behind it, so they never change once they are there: keep them, and a step
computes one token instead of the whole text. This splits a request in two. *Prefill* computes the prompt, all tokens in one
call; *decode* computes one token a call.

What it costs: memory, which grows by one token's K and V in every layer at each step (and here is copied each time, because a
tensor cannot grow). And a decode call reads every weight of the model to compute a single token: the arithmetic units wait for
memory nearly all the time. Rung 2 gives them more rows for the same reading.
"""

from minivllm.learn.desk import Desk
from minivllm.learn.model import Model
from minivllm.learn.rectangle import greedy, rectangle


def serve(model: Model, desk: Desk, batch_size: int) -> None:
    """Serve one request after the other; ``batch_size`` is of no use yet."""
    while found := desk.take(1):
        request = found[0]
        num_prompt = len(request.prompt)
        logits, cache = model(rectangle([list(request.prompt)]), rectangle([list(range(num_prompt))]))  # prefill
        desk.tell(request, greedy(logits)[0])
        while not request.done:  # decode: the newest token, at the position behind what is kept
            position = num_prompt + len(request.output) - 1
            logits, cache = model(rectangle([request.output[-1:]]), rectangle([[position]]), cache)
            desk.tell(request, greedy(logits)[0])
