"""Muon for the matrices inside the layers, AdamW for the embedding and the norms, one schedule for both.

Muon replaces a matrix's momentum by the nearest matrix whose singular values are all about one, so that every
direction of the matrix learns at the same rate. On little text seen many times it reaches a lower validation loss than
AdamW does; the model card has both. The idea is Keller Jordan's (2024); this is a short form of it that treats all
matrices of one shape as one batch, since a small model's step is mostly kernel launches.
"""

from collections import defaultdict

import torch
from torch import Tensor

from training.model import Llama
from training.recipe import TrainPlan

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic whose iteration pulls singular values to about one


def orthogonalise(matrices: Tensor, num_iterations: int = 5) -> Tensor:  # [count, rows, columns]
    """Singular values to about one, keeping the singular vectors; bf16 is precise enough for a direction."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Optimizer:
    """Owned by the training loop: the only writer of a model's weights while it trains."""

    def __init__(self, model: Llama, plan: TrainPlan, compile_kernels: bool) -> None:
        self.plan = plan
        matrices = [weight for name, weight in model.named_parameters() if "_proj" in name]
        others = [weight for name, weight in model.named_parameters() if "_proj" not in name]
        self.groups: list[tuple[list[Tensor], Tensor]] = []  # same-shaped matrices and their momentum
        adam_groups = [
            {"params": [w for w in others if w.ndim == 2], "lr": plan.adam_lr, "weight_decay": plan.embedding_decay},
            {"params": [w for w in others if w.ndim == 1], "lr": plan.adam_lr, "weight_decay": 0.0},
        ]
        if plan.muon_lr > 0:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in matrices:
                by_shape[weight.shape].append(weight)
            for shape, same in by_shape.items():
                self.groups.append((same, torch.zeros(len(same), *shape, device=same[0].device)))
        else:
            adam_groups.append({"params": matrices, "lr": plan.adam_lr, "weight_decay": plan.weight_decay})
        self.adam = torch.optim.AdamW(adam_groups, betas=(0.9, 0.95), eps=1e-8, fused=others[0].is_cuda)
        self.peak_lrs = [float(group["lr"]) for group in self.adam.param_groups]
        self.orthogonalise = torch.compile(orthogonalise, dynamic=False) if compile_kernels else orthogonalise

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        for group, peak in zip(self.adam.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * lr_scale
        self.adam.step()
        lr = self.plan.muon_lr * lr_scale
        for weights, momentum in self.groups:
            grads = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            momentum.lerp_(grads, 0.05)
            update = self.orthogonalise(grads.lerp(momentum, 0.95))  # Nesterov: look one step ahead
            rows, columns = weights[0].shape
            size = lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(weights, 1.0 - lr * self.plan.weight_decay)
            torch._foreach_add_(weights, list(update.float().unbind(0)), alpha=-size)


def lr_scale(step: int, num_steps: int, warmup_share: float) -> float:
    """Up in a straight line, then down in a straight line to zero: the last steps average what the first ones found."""
    warmup = max(1, int(num_steps * warmup_share))
    return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))
