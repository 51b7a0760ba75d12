"""Trains one model: on the text itself (a teacher), or on what the teachers say of every token (a student)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.corpus import Corpus, Windows, epoch_windows
from training.evaluate import validation_loss
from training.model import Llama
from training.optimizer import Optimizer, lr_scale
from training.recipe import Candidate, TrainPlan


@dataclass(frozen=True)
class Pool:
    """Windows with the teachers' most likely next tokens: what a student learns from."""

    windows: Windows
    top_ids: Tensor  # int16 [rows, window, top]
    top_probs: Tensor  # bf16 [rows, window, top]


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # int64 [rows, window]
    targets: Tensor  # int64 [rows, window]
    learn: Tensor  # bool [rows, window]
    top_ids: Tensor | None = None  # [rows, window, top]
    top_probs: Tensor | None = None


def _batches(windows: Windows, pool: Pool | None, plan: TrainPlan, epoch: int, device: torch.device) -> Iterator[Batch]:
    """One epoch in a new order; only whole batches, because one shape means one compiled program."""
    generator = torch.Generator().manual_seed(plan.seed * 1000 + epoch)
    order = torch.randperm(len(windows), generator=generator)
    all_ids, all_learn = windows.ids.to(device), windows.learn.to(device)
    rows = rows_per_batch(windows, plan)
    for first in range(0, len(windows) - rows + 1, rows):
        pick = order[first : first + rows].to(device)
        ids, learn = all_ids[pick].long(), all_learn[pick]
        top_ids = pool.top_ids[pick] if pool else None
        top_probs = pool.top_probs[pick] if pool else None
        yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), learn, top_ids, top_probs)


def rows_per_batch(windows: Windows, plan: TrainPlan) -> int:
    return min(plan.rows_per_step, len(windows))  # a very small text is one batch of what there is


def windows_of_epochs(corpus: Corpus, pool: Pool | None, plan: TrainPlan) -> list[Windows]:
    if pool is not None:
        return [pool.windows] * plan.epochs
    return [
        epoch_windows(corpus, epoch, plan.seed, plan.chat_share, plan.window, epoch >= plan.epochs - plan.core_epochs)
        for epoch in range(plan.epochs)
    ]


def batch_loss(logits: Tensor, batch: Batch, hard_weight: float) -> Tensor:
    """Mean over the learned tokens, in nats. The soft part treats all tokens outside the teachers' top as one."""
    log_probs = F.log_softmax(logits.float(), dim=-1)  # [rows, window, vocab]
    loss = -log_probs.gather(-1, batch.targets[..., None])[..., 0]  # [rows, window]
    if batch.top_ids is not None and batch.top_probs is not None:
        teacher = batch.top_probs.float()
        student = log_probs.gather(-1, batch.top_ids.long())  # [rows, window, top]
        teacher_rest = (1.0 - teacher.sum(-1)).clamp_min(0.0)
        student_rest = (1.0 - student.exp().sum(-1)).clamp_min(1e-6)
        soft = -(teacher * student).sum(-1) - teacher_rest * student_rest.log()
        loss = hard_weight * loss + (1.0 - hard_weight) * soft
    return (loss * batch.learn).sum() / batch.learn.sum().clamp_min(1)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 matrix products on a GPU; plain float32 on a CPU, where bf16 is slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def train_model(
    candidate: Candidate, corpus: Corpus, pool: Pool | None, device: torch.device, log: Callable[[str], None]
) -> Llama:
    """Seeded throughout: the same text, recipe and device give the same weights up to the order of GPU sums."""
    plan, name = candidate.plan, candidate.name
    torch.manual_seed(plan.seed)
    model = Llama(candidate.shape, plan.seed).to(device)
    use_compile = device.type == "cuda"  # on a CPU compiling costs more than a smoke run
    torch._dynamo.reset()  # or the programs of models trained before would count towards this one's limit
    optimizer = Optimizer(model, plan, use_compile)

    def loss_of(batch: Batch) -> Tensor:
        return batch_loss(model(batch.ids), batch, plan.hard_weight)

    step_loss = torch.compile(loss_of, dynamic=False) if use_compile else loss_of
    epochs = windows_of_epochs(corpus, pool, plan)
    num_steps = sum(len(windows) // rows_per_batch(windows, plan) for windows in epochs)
    step, started = 0, time.monotonic()
    for epoch, windows in enumerate(epochs):
        model.train()
        for batch in _batches(windows, pool, plan, epoch, device):
            with autocast(device):
                loss = step_loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(lr_scale(step, num_steps, plan.warmup_share))
            model.zero_grad(set_to_none=True)
            step += 1
        if (epoch + 1) % max(1, plan.epochs // 6) == 0 or epoch + 1 == plan.epochs:
            valid = validation_loss([model], corpus.valid, device).nats_per_token
            progress = f"{name} epoch {epoch + 1}/{plan.epochs} step {step}"
            log(f"{progress} train {loss.item():.3f} valid {valid:.4f} {time.monotonic() - started:.0f} s")
    return model.eval()
