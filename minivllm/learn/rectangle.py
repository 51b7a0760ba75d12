"""From Python's lists to the rectangles that the plain model takes, and back to tokens."""

import torch
from torch import Tensor


def greedy(logits: Tensor) -> list[int]:
    """The most likely token of each row of ``logits`` [rows, vocab]."""
    return [int(token) for token in logits.argmax(-1).tolist()]


def rectangle(rows: list[list[int]]) -> Tensor:
    """Rows of one length, or of several: short ones get zeros on the left. [rows, width]."""
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def places(lengths: list[int], columns: int) -> Tensor:
    """The mask of rows that are padded on the left: which of ``columns`` hold a token. [rows, columns]."""
    return torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
