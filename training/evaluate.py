"""Validation: the held-out stories as one stream, cut into windows, every token predicted once.

The figure is the mean over all tokens, `<|endoftext|>` included, in nats. A token early in a window has little before
it, so a longer window gives a lower figure; the model card's is that of 512 unless it says otherwise.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import Llama


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    num_tokens: int

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.nats_per_token * self.num_tokens / math.log(2) / num_bytes


@torch.no_grad()
def validation_loss(models: Sequence[Llama], valid: Tensor, device: torch.device, window: int = 512) -> Score:
    """The loss of one model, or of the average of several models' probabilities."""
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for rows in _rows(valid, window):
        ids = rows.to(device, torch.int64)
        log_probs = average_log_probs(models, ids[:, :-1])  # [rows, window, vocab]
        nats -= log_probs.gather(-1, ids[:, 1:, None]).sum(dtype=torch.float64)
    for model, training in zip(models, was_training, strict=True):
        model.train(training)
    return Score(nats.item() / (len(valid) - 1), len(valid) - 1)


def _rows(valid: Tensor, window: int, rows_per_batch: int = 32) -> list[Tensor]:
    """Windows that overlap by the one token that is context in the next and target in this; the last one is short."""
    num_rows = (len(valid) - 1) // window
    rows = valid[: num_rows * window + 1].unfold(0, window + 1, window)
    batches = [rows[first : first + rows_per_batch] for first in range(0, num_rows, rows_per_batch)]
    last = valid[num_rows * window :]
    return batches + ([last[None]] if len(last) > 1 else [])


def average_log_probs(models: Sequence[Llama], ids: Tensor) -> Tensor:
    """Log of the mean probability of several models; float32 [rows, time, vocab]."""
    on_gpu = ids.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
        logits = [model(ids) for model in models]
    log_probs = torch.stack([F.log_softmax(one.float(), dim=-1) for one in logits])
    return torch.logsumexp(log_probs, dim=0) - math.log(len(models))


@torch.no_grad()
def greedy_agreement(model: Llama, draft: Llama, valid: Tensor, device: torch.device, window: int = 512) -> float:
    """Share of held-out positions at which both models would pick the same next token."""
    same, total = 0, 0
    for rows in _rows(valid, window):
        ids = rows.to(device, torch.int64)[:, :-1]
        picks = [average_log_probs([one], ids).argmax(-1) for one in (model, draft)]
        same += int((picks[0] == picks[1]).sum())
        total += ids.numel()
    return same / total
