"""Greedy tokens equal transformers', in float32 and in every way of computing them.

Sums depend on the shape of a batch, so a token may differ from a float64 reference (given the same tokens before it) where its
two best are closer than ``GAP``. Such positions are listed; anything else fails.
"""

from pathlib import Path

import pytest
import torch
from parity_lab import CASES, NUM_PROMPTS, five_ways, make_prompts
from tiny_models import SMALL
from transformers import AutoModelForCausalLM

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


def check_every_way(folder: Path, prompts: list[list[int]], kernels: str) -> None:
    """Compare every token of every way with a float64 transformers model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    runs = five_ways(folder, prompts, batch_invariant=False, cpu_kernels=kernels)
    references: dict[tuple[int, tuple[int, ...]], tuple[list[int], list[float]]] = {}
    ties: list[tuple[str, int]] = []
    for way, run in runs.items():
        for i, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
            key = (i, tuple(tokens))
            if key not in references:
                references[key] = float64_gaps(model, prompt, tokens)
            ties += near_ties(f"{way} {i}", tokens, references[key])
    print(f"near-ties: {ties}")
    assert len(ties) <= len(runs) * NUM_PROMPTS // 8


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("case_folder", CASES, indirect=True)
def test_random_models_equal_transformers_in_every_way(case_folder: Path, kernels: str) -> None:
    check_every_way(case_folder, make_prompts(SMALL["vocab_size"]), kernels)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_bundled_model_equals_transformers_in_every_way(bundled_model: Path, kernels: str) -> None:
    check_every_way(bundled_model, make_prompts(4000), kernels)
