"""Whether rungs say the same: greedy texts are equal, or part at a position where the model has no favourite.

Sums depend on the shape of a batch, in the last bits. So two right programs may choose differently where the two best tokens
are as good as equal, and from there on the texts have nothing to do with each other. The plain model says whether it was so.
"""

from collections.abc import Mapping, Sequence

import torch

from minivllm.learn.desk import Request
from minivllm.learn.model import Model
from minivllm.learn.rectangle import rectangle
from minivllm.learn.result import Agreement

NEAR_TIE = 5e-4  # of float32 logits whose spread is several units: above rounding, far below a real difference


def compare(model: Model, requests: Sequence[Request], earlier: Sequence[Mapping[str, Request]]) -> Agreement:
    """Compare each request's output with that of the first of ``earlier`` runs that has it."""
    compared = equal = near = 0
    widest = 0.0
    for request in requests:
        other = next((run[request.id] for run in earlier if request.id in run), None)
        if other is None:
            continue
        compared += 1
        if all(a == b for a, b in zip(other.output, request.output, strict=False)):  # one of them may be cut short
            equal += 1
            continue
        behind = _behind(model, request, other)
        near += behind < NEAR_TIE
        widest = max(widest, behind)
    return Agreement(compared, equal, near, compared - equal - near, widest)


def _behind(model: Model, one: Request, other: Request) -> float:
    """How far the worse of both tokens is behind the best one, where the texts part."""
    at = next(i for i, (a, b) in enumerate(zip(one.output, other.output, strict=False)) if a != b)
    text = [*one.prompt, *one.output[:at]]
    logits, _ = model(rectangle([text]), rectangle([list(range(len(text)))]), keep=False)
    behind = logits[0].max() - logits[0][torch.tensor([one.output[at], other.output[at]], device=logits.device)]
    return float(behind.max())
