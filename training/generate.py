"""Samples many stories at once, one token at a time, with a key/value cache: the plainest form of what the engine does.

Prompts differ in length, yet every row is always at the same position: while a row is still inside its prompt the
sampled token is thrown away and the prompt's token taken instead. No padding, no masks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.model import KvCache, Llama


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Each prompt with its continuation, the stop token included; a row that never stopped lacks one.

    `model` should be in bf16 on a GPU; temperature 0 is greedy.
    """
    weight = model.model.embed_tokens.weight
    device = weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), max_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    stops = torch.tensor(stop_ids, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end = torch.full_like(lengths, max_tokens)
    cache = KvCache.empty(model.shape, len(prompts), max_tokens, weight)
    for position in range(1, max_tokens):
        logits = model(ids[:, position - 1 : position], cache)[:, -1].float()  # [rows, vocab]
        picked = _pick(logits, temperature, generator)
        in_prompt = position < lengths
        ids[:, position] = torch.where(in_prompt, ids[:, position], picked)
        stopped = ~in_prompt & ~done & torch.isin(ids[:, position], stops)
        end = torch.where(stopped, position + 1, end)
        done |= stopped
        if position % 16 == 0 and bool(done.all()):  # asking the device makes it wait, so ask seldom
            break
    return [row[:length] for row, length in zip(ids.tolist(), end.tolist(), strict=True)]


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:  # [rows]
    if temperature == 0.0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
