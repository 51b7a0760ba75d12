"""What the sampling features see of a step: which rows sample, where in their sequence, and their known tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minivllm.types import NewRow


@dataclass(frozen=True)
class SampleBatch:
    """The rows that get a token in this step, or a part of them."""

    rows: np.ndarray  # [num_sampled] int64
    positions: np.ndarray  # [num_sampled] int64: index of the token to be sampled = number of tokens known before it
    tokens: Tensor  # [max_num_seqs, max_model_len] int32, on the logits' device

    @property
    def on_host(self) -> bool:
        """True where reading a value back waits for nothing; another device runs behind the host and must not be asked."""
        return self.tokens.device.type == "cpu"

    def take(self, where: np.ndarray) -> "SampleBatch":
        """Some of the rows, by place in this batch."""
        return SampleBatch(self.rows[where], self.positions[where], self.tokens)

    def logits_of(self, where: np.ndarray, token_ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Where in the logits the tokens of some rows stand: places ``where`` [n], and for each its ``token_ids``. Two indices
        [all tokens] beside the logits."""
        places = np.repeat(where, [len(ids) for ids in token_ids])
        return self.put(places), self.put(np.concatenate(token_ids))

    def put(self, values: np.ndarray) -> Tensor:
        """A host array beside the logits, by a fresh pinned page where the device is another."""
        page = torch.from_numpy(np.ascontiguousarray(values))
        return page if self.on_host else page.pin_memory().to(self.tokens.device, non_blocking=True)


class Feature(Protocol):
    """One sampling feature: its values by row, and what they do to the logits.

    ``apply`` changes the logits in place and must leave rows that do not ask for the feature bitwise as they are; it may look
    at nothing of a row but its own logits, values, position and tokens, so that a token never depends on its neighbours.
    """

    def set_row(self, new: NewRow) -> None:
        """Take over the values of a sequence that got a row."""

    def active(self, batch: SampleBatch) -> bool:
        """True when some row of the batch asks for it; otherwise ``apply`` is not called."""

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """Change logits [num_sampled, vocab] float32 in place."""


def mask_below(logits: Tensor, lowest: Tensor) -> None:
    """Take tokens under each row's lowest kept logit out of the draw. ``lowest``: [num_sampled] float32."""
    logits.masked_fill_(logits < lowest[:, None], -torch.inf)
