"""The rule by which two right programs may choose different tokens.

Sums depend on the shape of a batch, so a token may differ from a float64 reference (given the same tokens before it) where its
two best are closer than ``GAP``. Such positions are listed; anything else fails.
"""

import torch

GAP = 5e-4  # of logits whose spread is several units: a little above float32 rounding, far below a real difference


def float64_gaps(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
    """The reference's greedy choice after each prefix of prompt + tokens, and how far the second best is behind."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double()  # [new tokens, vocab]
    best = logits.topk(2, dim=-1)
    return best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()


def near_ties(name: str, ours: list[int], reference: tuple[list[int], list[float]]) -> list[tuple[str, int]]:
    """Positions where our token is not the reference's best; fails where that is more than a near-tie."""
    ties = []
    for position, (token, best, gap) in enumerate(zip(ours, *reference, strict=True)):
        if token != best:
            assert gap < GAP, f"{name}: token {position} is {token}, the reference says {best} by {gap:.4f}"
            ties.append((name, position))
    return ties
