"""The runner: it computes what a plan says and decides nothing.

A step has three moments. ``launch`` applies the plan's differences to the rows and runs the body of the model;
``Pending.sample`` turns the last hidden states into tokens and writes them where the next step reads them;
``Pending.result`` is the only place that waits. So a next step may be launched before anybody has read this one's tokens.

The runner never asks who a sequence belongs to, whether it is finished or why it runs. What it cannot do it refuses with a
``PlanError``, and never obeys in part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttentionBackend, KVLayer
from minivllm.kernels.ops import Ops
from minivllm.kernels.reference import RowLogprobs
from minivllm.models.decoder import Decoder
from minivllm.runner.batch import Sampled, build_batch, to_device
from minivllm.runner.faults import faults_of
from minivllm.runner.logprobs import Asking, LogprobRows, PromptLogprobs, by_prompt, by_work, told
from minivllm.runner.rows import Int64, PlanError, Rows, TokenTable, fault_of
from minivllm.types import WANT_POOL, CopyBlock, NewRow, StepPlan, StepResult, StepTimes, TokenLogprobs

Masks = npt.NDArray[np.int32]  # [max_num_seqs, 1 + words of 32 tokens], by row: see ``reference.rule_out``


class AnyRunner(Protocol):
    """One device's share of a model and its running rows, however it computes."""

    decoder: Decoder
    caches: tuple[KVLayer, ...]
    ops: Ops
    rows: Rows
    sampler: "RowSampler"
    logprob_rows: LogprobRows

    def launch(self, plan: StepPlan) -> "AnyPending":
        """Apply the plan's differences, start its step. Raises ``PlanError``, ``RequestFault`` and what ``faults_of`` does."""

    def prepare_more(self) -> bool:
        """Nothing else is to be done: make later steps faster, a little at a time. False: there is nothing left to make."""


class AnyPending(Protocol):
    """A launched step."""

    def sample(self, masks: Masks | None = None) -> None:
        """Run the head and choose tokens; ``masks`` are wanted where the plan has grammar rows."""

    def result(self) -> StepResult:
        """Wait for the tokens; row i of the result is the plan's work i."""


class RowSampler(Protocol):
    """What chooses tokens; the real one is ``sampling/sampler.py``."""

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row, with its sampling parameters."""

    def free_row(self, row: int) -> None:
        """Nobody has the row any more."""

    def sample(self, logits: Tensor, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: Tensor) -> Tensor:
        """``logits`` [num_sampled, vocab] float32, which may be overwritten -> token ids [num_sampled] int64.

        ``positions`` [num_sampled]: index in its sequence of the token to come; ``tokens`` [max_num_seqs, over max_model_len]
        int32: the known tokens of every row.
        """


MakeSampler = Callable[[int, int, tuple[int, ...]], RowSampler]  # (max_num_seqs, vocab_size, eos_token_ids) -> a sampler


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute: what runners are given."""

    decoder: Decoder
    caches: tuple[KVLayer, ...]  # one a layer
    backend: AttentionBackend
    ops: Ops


class Pending:
    """A launched step. Written by the thread that drives the runner."""

    def __init__(self, runner: "Runner", plan: StepPlan, hidden: Tensor | None, sampled: Sampled | None) -> None:
        self.runner, self.plan = runner, plan
        self.hidden, self.sampled = hidden, sampled  # [num_sampled, hidden]; None: nothing to sample
        self.launched_s = time.monotonic()
        self.token_ids: Tensor | None = None  # [num_sampled] int64
        self.bad: Tensor | None = None  # [num_sampled]: logits that are not numbers
        self.asking: Asking | None = None
        self.logprobs: RowLogprobs | None = None  # of the rows that ask
        self.of_prompts: PromptLogprobs | None = None
        self.done = False

    @torch.inference_mode()
    def sample(self, masks: Masks | None = None) -> None:
        """Run the head and choose tokens. ``masks`` are those of the plan's grammar rows, computed while the body ran."""
        check_guided(self.plan, masks, None if self.sampled is None else self.sampled.rows)
        self.done = True
        if self.hidden is not None and self.sampled is not None:
            with faults_of(self.hidden.device):
                self._sample(self.hidden, self.sampled, masks)

    def _sample(self, hidden: Tensor, chosen: Sampled, masks: Masks | None) -> None:
        logits = self.runner.decoder.head(hidden)  # [num_sampled, vocab]
        self.bad = ~self.runner.ops.choose(logits)[1]
        if logits.device.type != "cpu" or bool(self.bad.any()):  # another device must not be asked: that would wait for it
            logits.masked_fill_(self.bad[:, None], 0.0)  # a sampler need not know what to do with NaN
        self.asking = self.runner.logprob_rows.asking(chosen.rows)
        where = None if self.asking is None else to_device(self.asking.places, logits.device)
        raw = None if where is None else logits[where]
        if masks is not None:
            of_rows = to_device(masks[: int(chosen.rows.max()) + 1, : 1 + -(-logits.shape[1] // 32)], logits.device)
            self.runner.ops.rule_out(logits, chosen.device_rows, of_rows)
        self.token_ids = self.runner.sampler.sample(logits, chosen.rows, chosen.positions, self.runner.table.tokens)
        if self.asking is not None and raw is not None and where is not None:
            self.logprobs = self.runner.ops.logprobs(raw, self.token_ids[where], self.asking.most)
        self.runner.table.put(chosen.device_rows, chosen.device_positions, self.token_ids)
        self.hidden = None

    def result(self) -> StepResult:
        """Wait for the tokens; row i of the result is the plan's work i."""
        if not self.done:
            raise PlanError("sample() must be called before result()")
        with faults_of(self.runner.table.tokens.device):
            return self._result()

    def _result(self) -> StepResult:
        tokens: list[tuple[int, ...]] = [()] * len(self.plan.work)
        bad_rows: list[int] = []
        if self.token_ids is not None and self.sampled is not None and self.bad is not None:
            for place, token, bad in zip(self.sampled.work, self.token_ids.tolist(), self.bad.tolist(), strict=True):
                tokens[place] = (token,)
                if bad:
                    bad_rows.append(place)
        times = StepTimes(self.launched_s, time.monotonic())
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if self.logprobs is not None and self.asking is not None and self.sampled is not None:
            logprobs = by_work(told(self.logprobs, self.asking), self.sampled.work, len(self.plan.work))
        of_prompts, bad_prompts = by_prompt(self.of_prompts, len(self.plan.work))
        bad = tuple(bad_prompts.union(bad_rows)) if bad_rows or bad_prompts else ()
        return StepResult(self.plan.step, tuple(tokens), times, bad, logprobs, of_prompts)


class Runner:
    """One device's share of a model and its running rows. Driven by one thread; the scheduler's plans are its only input."""

    def __init__(self, loaded: Loaded, rows: Rows, table: TokenTable, sampler: RowSampler) -> None:
        """``table`` is the one that ``rows`` tells of tokens."""
        self.decoder, self.caches, self.backend, self.ops = loaded.decoder, loaded.caches, loaded.backend, loaded.ops
        self.rows, self.table, self.sampler = rows, table, sampler
        self.logprob_rows = LogprobRows(len(rows.uid))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Apply the plan's differences and run the body. Raises as ``AnyRunner`` says."""
        refuse_unbuilt(plan)
        with faults_of(self.table.tokens.device):
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> Pending:
        take_differences(self, plan, self.table.tokens.device)
        if not plan.work:
            return Pending(self, plan, None, None)
        step = self.rows.begin(plan.work)
        batch, sampled = build_batch(step, self.rows, self.table.tokens, self.backend)
        self.rows.advance(step)
        hidden = self.decoder.body(batch, self.caches)  # [num_tokens, hidden]
        chosen = hidden.index_select(0, batch.logit_rows) if sampled.work else None
        pending = Pending(self, plan, chosen, sampled)
        pending.of_prompts = self.logprob_rows.of_prompts(step, self.rows.num_prompt, hidden, self.table.tokens, self)
        return pending

    def prepare_more(self) -> bool:
        """Nothing is left: this runner is as fast at once as it will be."""
        return False


def check_guided(plan: StepPlan, masks: Masks | None, sampled: Int64 | None) -> None:
    """Raise ``PlanError`` unless masks came if there are grammar rows; ``sampled`` [num_sampled]: rows that get a token."""
    if (masks is not None) != bool(plan.grammar_rows):
        came = "none" if masks is None else "some"
        raise PlanError(f"the plan has {len(plan.grammar_rows)} grammar rows, but of masks {came} came")
    if not set(plan.grammar_rows).issubset(() if sampled is None else sampled.tolist()):
        raise PlanError("a grammar row of the plan does not sample in this step")


def take_differences(runner: AnyRunner, plan: StepPlan, device: torch.device) -> None:
    """What a plan says of rows and of whole blocks."""
    if plan.zeroed:
        blocks = to_device(np.array([block for _, block in plan.zeroed], dtype=np.int64), device)
        for cache in runner.caches:
            cache.k.index_fill_(0, blocks, 0)
            cache.v.index_fill_(0, blocks, 0)
    for row in plan.freed_rows:
        runner.rows.free(row)
        runner.sampler.free_row(row)
    for new in plan.new_rows:
        with fault_of(new.uid):
            runner.rows.take(new)
            runner.sampler.set_row(new)
            runner.logprob_rows.set_row(new)
    copy_blocks(plan.copies, runner.caches, runner.ops, device)


def copy_blocks(copies: Sequence[CopyBlock], caches: Sequence[KVLayer], ops: Ops, device: torch.device) -> None:
    """Copy whole blocks in every layer, all sources read before any is overwritten."""
    if not copies:
        return
    places = np.array([[c.src for c in copies], [c.dst for c in copies]], dtype=np.int64)
    src, dst = to_device(places, device)
    for cache in caches:
        ops.copy_blocks(cache.k, src, dst)
        ops.copy_blocks(cache.v, src, dst)


def refuse_unbuilt(plan: StepPlan) -> None:
    """Raise ``PlanError`` for what the types can say and no runner here can do."""
    for new in plan.new_rows:
        if new.lora_slot:
            raise PlanError("LoRA adapters are not built")
    for work in plan.work:
        if work.draft_ids:
            raise PlanError("draft tokens are not built")
        if work.wants & WANT_POOL:
            raise PlanError("pooling is not built")
    if any(copy.group for copy in plan.copies) or any(group for group, _ in plan.zeroed):
        raise PlanError("there is one KV group only")
