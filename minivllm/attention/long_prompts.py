"""Long prompts by a library's attention (cuDNN, through torch), which is faster at them than the Triton kernel.

A library is called with sizes known on the host, so this serves steps that are not captured. cuDNN makes a new plan for every
size it meets, which takes far longer than the attention itself; so it is given whole multiples of ``GRAIN`` queries only, over
pasts that are such multiples too, and what is left of a row goes to the Triton kernel as the row's next chunk would.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttnMeta, AttnNeed

if TYPE_CHECKING:
    from minivllm.kernels.triton.chip import Chip

log = logging.getLogger("minivllm")
GRAIN = 4096  # queries; shorter prompts gain nothing (1.6 times at 8,192 after 24,576, and half as fast at 1,024)

# (q [b, heads, n, dim], k and v [b, kv heads, m, dim], causal, scale) -> result like q, log of the denominators [b, heads, n]
Library = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LongCall:
    """Neighbouring rows of equal length without a past, or one row with one."""

    first_token: int
    num_rows: int
    length: int  # queries of each row
    past: int  # tokens in the cache before them
    table: Tensor | None  # the row's block table, where there is a past


@dataclass(frozen=True)
class LongStep:
    """What the library computes of a step."""

    taken: npt.NDArray[np.int64]  # [num_rows]: leading queries of each row
    calls: tuple[LongCall, ...]


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A ``Library``."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return found[0], found[1].reshape(q.shape[:3])


def cudnn_by_head(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The same where cuDNN wants as many KV heads as query heads."""
    group = q.shape[1] // k.shape[1]
    return cudnn(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), causal, scale)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The meaning of a ``Library``, in float32."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.float() @ keys.transpose(2, 3) * scale  # [b, heads, n, m]
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ values).to(q.dtype), scores.logsumexp(-1)


def _right(library: Library, need: AttnNeed) -> bool:
    """Try it on random numbers, over its own tokens and over others."""
    generator = torch.Generator(need.device).manual_seed(0)
    heads = (need.num_heads, need.num_kv_heads, need.num_kv_heads)
    q, k, v = (
        torch.randn((1, 128, n, need.head_dim), generator=generator, device=need.device, dtype=need.dtype).transpose(1, 2)
        for n in heads
    )
    for causal, m in ((True, 128), (False, 64)):
        asked = (q, k[:, :, :m], v[:, :, :m], causal, need.head_dim**-0.5)
        for found, expected in zip(library(*asked), plain(*asked), strict=True):
            if not torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05):
                return False
    return True


def find_library(need: AttnNeed) -> tuple[Library | None, str]:
    """A library that serves this need, or None, and a sentence that says so."""
    reason = ""
    if need.device.type != "cuda":
        reason = "it runs on a GPU"
    elif need.dtype not in (torch.bfloat16, torch.float16):
        reason = f"it does not know {need.dtype}"
    elif need.batch_invariant:
        reason = "its results are not batch-invariant"
    elif all(window is not None for window in need.windows):
        reason = "every layer has a sliding window"
    for library, manner in ((cudnn, ""), (cudnn_by_head, ", with K and V repeated for each query head")) if not reason else ():
        try:
            if _right(library, need):
                return library, f"Prompts of {GRAIN} tokens and more use cuDNN's attention{manner}."
            reason = "its results differ"
        except RuntimeError as refused:
            reason = str(refused).partition("\n")[0]
    return None, f"Long prompts do not use cuDNN's attention: {reason}."


class LongPrompts:
    """Splits steps and calls the library. Written once, by the first step with a long prompt: cuDNN takes seconds to load, and
    most servers never need it."""

    def __init__(self, need: AttnNeed, chip: "Chip", library: Library | None = None, grain: int = GRAIN) -> None:
        from minivllm.kernels.triton.past import Past  # as in ``triton.py``

        self.grain, self._need, self._past = grain, need, Past(chip)
        self._library, self._looked = library, library is not None

    def workspace_bytes(self, num_tokens: int, max_model_len: int) -> int:
        """What a step of ``num_tokens`` may need for a row's past, made dense, and for two results before they are one."""
        if max_model_len < self.grain:
            return 0
        need = self._need
        past = 2 * max_model_len * need.num_kv_heads * need.head_dim * need.dtype.itemsize
        result = num_tokens * need.num_heads * (need.head_dim * need.dtype.itemsize + 4)
        return past + 3 * result

    def plan(self, host: AttnMeta, block_tables: Tensor) -> LongStep | None:
        """What the library takes of a step; None: nothing. The rule is also in ``kernels/triton/attention_plan.py``."""
        counts = host.query_starts[1:] - host.query_starts[:-1]  # [num_rows]
        if not (counts >= self.grain).any():
            return None
        if not self._looked:
            self._looked = True
            self._library, note = find_library(self._need)
            log.info(note)
        if self._library is None:
            return None
        pasts = host.context_lens - counts
        taken = np.where(pasts % self.grain == 0, counts // self.grain * self.grain, 0)
        calls: list[LongCall] = []
        for i in np.flatnonzero(taken).tolist():
            first, length, past = int(host.query_starts[i]), int(taken[i]), int(pasts[i])
            before = calls[-1] if calls else None
            beside = before is not None and before.first_token + before.num_rows * before.length == first
            if before is not None and beside and past == before.past == 0 and length == before.length:
                calls[-1] = LongCall(before.first_token, before.num_rows + 1, length, 0, None)
            else:
                calls.append(LongCall(first, 1, length, past, block_tables[int(host.rows[i])] if past else None))
        return LongStep(taken, tuple(calls)) if calls else None

    def attend(
        self, step: LongStep, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, caches: tuple[Tensor, Tensor], scale: float
    ) -> None:
        """Fill ``out`` [num_tokens, num_heads, head_dim] for the queries taken. ``qkv``: the step's, turned, dense but for v's
        tokens; the past is read from ``caches``."""
        library = self._library
        if library is None:
            raise ValueError("no step was planned for a library")
        for call in step.calls:
            tokens = slice(call.first_token, call.first_token + call.num_rows * call.length)
            shape = (call.num_rows, call.length)
            q, k, v = (x[tokens].view(*shape, *x.shape[1:]).transpose(1, 2) for x in qkv)  # [rows, heads, length, head_dim]
            own, own_log = library(q, k, v, True, scale)
            if call.table is None:
                out[tokens].view(*shape, *out.shape[1:]).copy_(own.transpose(1, 2))
                continue
            past_k, past_v = self._past.gather(caches, call.table, call.past, q.dtype)
            past, past_log = library(q, past_k[None], past_v[None], False, scale)
            self._past.merge(out[tokens], (own[0], own_log[0].contiguous()), (past[0], past_log[0].contiguous()))
