"""The runner of a device that runs behind the host: same promises as ``Runner``, but nothing is waited for.

A step is one copy (its page), a kernel or two for what is new, and two pieces: the *body* from token ids to hidden states, and
the *head*: logits, the drawn tokens, and these put where the next step reads them. Rows that follow a grammar have their masks
brought before a head that looks at them. Each piece is replayed as a graph where one was captured (``runner/graphs.py``).
Then a copy of the tokens back to the host is asked for; ``Pending.result`` waits for that copy and for nothing else, and at
depth 1 it does so while the next step is running.

What only some requests ask of sampling (penalties, top-p and the like) runs as an eager tail in place of the head piece.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttnMeta, DeviceAttention
from minivllm.kernels.reference import RowLogprobs
from minivllm.kernels.triton.sampling import NUM_WISHES, Draw
from minivllm.runner.batch import to_device
from minivllm.runner.faults import faults_of
from minivllm.runner.graphs import Graphs, Part, ladder
from minivllm.runner.logprobs import Asking, LogprobRows, PromptLogprobs, by_prompt, by_work, to_host, told
from minivllm.runner.page import Runs
from minivllm.runner.rows import Int64, PlanError, Rows, RowStep
from minivllm.runner.runner import Loaded, Masks, RowSampler, check_guided, refuse_unbuilt, take_differences
from minivllm.runner.seating import Int32, Seater
from minivllm.runner.stage import Stage
from minivllm.types import StepPlan, StepResult, StepTimes, TokenLogprobs

DECODE, SHARED, MIXED, HEAD, GUIDED = "decode", "decode that shares", "mixed", "head", "head under masks"
LEAST_MIXED = 16  # tokens: smaller steps with a prompt in them are padded up to this
MAX_CAPTURED_TOKENS = 2048  # larger steps keep the device busy for longer than their launches take


Captured = Mapping[str, Sequence[int]]


def captured_sizes(max_num_seqs: int, max_num_tokens: int, *, shares: bool) -> Captured:
    """The sizes of each part that are worth a graph. ``shares``: the backend looks at common beginnings."""
    rows = ladder(max_num_seqs)
    tokens = ladder(min(MAX_CAPTURED_TOKENS, max_num_tokens))
    mixed = tuple(n for n in tokens if n >= LEAST_MIXED)
    return {DECODE: rows, SHARED: rows if shares else (), MIXED: mixed, HEAD: rows, GUIDED: rows}


@runtime_checkable
class Wishing(Protocol):
    """A sampler that can say in numbers how rows draw, if they ask for nothing else."""

    def plain(self, rows: Int64, positions: Int64) -> bool:
        """True when no row asks for more than a temperature."""

    def wishes(self, rows: Int64, positions: Int64) -> Int32:
        """[num_sampled, NUM_WISHES]: see ``kernels/triton/sampling.py``."""


class DevicePending:
    """A launched step. Written by the thread that drives the runner."""

    def __init__(self, runner: "DeviceRunner", plan: StepPlan, step: RowStep | None, plain: bool) -> None:
        self.runner, self.plan, self.step, self.plain = runner, plan, step, plain
        self.launched_s = time.monotonic()
        self.tokens: npt.NDArray[np.int32] | None = None  # [num_sampled]; read after ``arrived``
        self.arrived: torch.cuda.Event | None = None
        self.asking: Asking | None = None
        self.logprobs: RowLogprobs | None = None  # of the rows that ask; read after ``arrived``
        self.of_prompts: PromptLogprobs | None = None
        self.done = False

    @torch.inference_mode()
    def sample(self, masks: Masks | None = None) -> None:
        """Launch the head and ask for the tokens. ``masks``: of the plan's grammar rows, computed while the body ran."""
        sampled = None if self.step is None else self.step.rows[self.step.sampling]
        check_guided(self.plan, masks, sampled)
        self.done = True
        if self.step is not None and sampled is not None and len(sampled):
            with self.runner.failing_whole():
                if masks is not None:
                    self.runner.stage.send_masks(masks, int(sampled.max()) + 1)
                self.asking = self.runner.logprob_rows.asking(sampled)
                found = self.runner.sample(self.step, self.plain, self.asking, guided=masks is not None)
                self.tokens, self.logprobs, self.arrived = found
        self.runner.graphs.capture_missed()

    def result(self) -> StepResult:
        """Wait for the tokens; row i of the result is the plan's work i."""
        if not self.done:
            raise PlanError("sample() must be called before result()")
        with self.runner.failing_whole():
            return self._result()

    def _result(self) -> StepResult:
        tokens: list[tuple[int, ...]] = [()] * len(self.plan.work)
        bad_rows: list[int] = []
        if self.tokens is not None and self.step is not None:
            if self.arrived is not None:
                self.arrived.synchronize()
            for place, token in zip(self.step.sampling.tolist(), self.tokens.tolist(), strict=True):
                if token < 0:
                    bad_rows.append(place)
                    token = -1 - token
                tokens[place] = (token,)
        times = StepTimes(self.launched_s, time.monotonic())
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if self.logprobs is not None and self.asking is not None and self.step is not None:
            logprobs = by_work(told(self.logprobs, self.asking), self.step.sampling.tolist(), len(self.plan.work))
        of_prompts, bad_prompts = by_prompt(self.of_prompts, len(self.plan.work))
        bad = tuple(bad_prompts.union(bad_rows)) if bad_rows or bad_prompts else ()
        return StepResult(self.plan.step, tuple(tokens), times, bad, logprobs, of_prompts)


class DeviceRunner:
    """One device's share of a model and its running rows. Driven by one thread; plans are its only input."""

    def __init__(
        self, loaded: Loaded, rows: Rows, runs: Runs, sampler: RowSampler, stage: Stage, draw: Draw, captured: Captured
    ) -> None:
        """``runs`` is what ``rows`` tells of tokens and blocks; ``captured``: sizes that may be captured, by part."""
        self.decoder, self.caches, self.ops = loaded.decoder, loaded.caches, loaded.ops
        self.backend = cast(DeviceAttention, loaded.backend)
        self.rows, self.runs, self.sampler, self.stage, self._draw = rows, runs, sampler, stage, draw
        self.logprob_rows = LogprobRows(stage.scratch_row)
        shape = self.backend.shared_shape
        self._seater = None if shape is None else Seater(shape, rows.block_size, stage.scratch_row)
        runs_of: dict[str, Callable[[int], None]] = {
            DECODE: lambda size: self.body(size, True, None),
            SHARED: lambda size: self.body(size, True, None, shared=True),
            MIXED: lambda size: self.body(size, False, None),
            HEAD: self.head,
            GUIDED: self.guided_head,
        }
        parts = {name: Part(run, captured.get(name, ()), name not in (SHARED, GUIDED)) for name, run in runs_of.items()}
        self.graphs = Graphs(parts, stage.blank, stage.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> DevicePending:
        """Apply the plan's differences and launch the body. Raises as ``AnyRunner`` says."""
        refuse_unbuilt(plan)
        with self.failing_whole():
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> DevicePending:
        take_differences(self, plan, self.stage.device)
        if not plan.work:
            return DevicePending(self, plan, None, True)
        step = self.rows.begin(plan.work)
        rows, positions = step.rows[step.sampling], step.ends[step.sampling]
        plain = isinstance(self.sampler, Wishing) and self.sampler.plain(rows, positions)
        plain = plain and self.logprob_rows.asking(rows) is None
        num_tokens = int(step.lengths.sum())
        if num_tokens > (most := len(self.stage.token_ids)):
            raise PlanError(f"a step of {num_tokens} tokens was planned for a runner of {most}")
        decode, seating = num_tokens == len(step.rows), None
        if decode and plan.shared and self._seater is not None:
            seating = self._seater.seat(plan.shared, step.rows)
        starts = self.stage.send(step, self.runs, self._wishes(rows, positions), seating)
        self.rows.advance(step)
        part = MIXED if not decode else DECODE if seating is None else SHARED
        pending = DevicePending(self, plan, step, plain)
        if len(step.telling) or not self.graphs.run(part, num_tokens):  # a captured piece keeps its hidden states to itself
            host = self.stage.on_host(step, starts, self.rows, num_tokens)
            hidden = self.hidden(num_tokens, decode, host, shared=seating is not None)
            pending.of_prompts = self.logprob_rows.of_prompts(step, self.rows.num_prompt, hidden, self.stage.tokens, self)
        return pending

    @contextmanager
    def failing_whole(self) -> Iterator[None]:
        """A step that fails leaves nothing behind for the next one. Raises what ``faults_of`` does."""
        try:
            with faults_of(self.stage.device):
                yield
        except BaseException:
            self.runs.clear()
            raise

    def _wishes(self, rows: Int64, positions: Int64) -> Int32:
        """How rows draw; for a sampler that cannot say it in numbers, only where their tokens go."""
        if isinstance(self.sampler, Wishing):
            return self.sampler.wishes(rows, positions)
        wishes = np.zeros((len(rows), NUM_WISHES), dtype=np.int32)
        wishes[:, 0], wishes[:, 1] = rows, positions
        return wishes

    def body(self, num_tokens: int, decode: bool, host: AttnMeta | None, *, shared: bool = False) -> None:
        """From the page to the hidden states that logits are wanted of. Can be captured when ``host`` is None."""
        self.hidden(num_tokens, decode, host, shared=shared)

    def hidden(self, num_tokens: int, decode: bool, host: AttnMeta | None, *, shared: bool = False) -> Tensor:
        """The same; the hidden states [num_tokens, hidden] of all tokens."""
        batch = self.stage.batch(num_tokens, decode, self.backend, host, shared)
        hidden = self.decoder.body(batch, self.caches)
        torch.index_select(hidden, 0, batch.logit_rows, out=self.stage.sampled[: len(batch.logit_rows)])
        return hidden

    def head(self, num_rows: int) -> None:
        """From hidden states to tokens, for rows that ask for a temperature at most. Can be captured."""
        logits = self.decoder.head(self.stage.sampled[:num_rows])  # [num_rows, vocab] float32
        wishes = self.stage.wishes[:num_rows]
        token_ids, finite = self._draw.draw(logits, wishes)
        self._put(token_ids, finite, wishes)

    def guided_head(self, num_rows: int) -> None:
        """As ``head``, where some of the rows follow a grammar. What it rules out is not looked at, whatever it is."""
        logits, wishes = self.decoder.head(self.stage.sampled[:num_rows]), self.stage.wishes[:num_rows]
        self.ops.rule_out(logits, wishes[:, 0], self.stage.masks)
        token_ids, finite = self._draw.draw(logits, wishes, masked=True)
        self._put(token_ids, finite, wishes)

    def _put(self, token_ids: Tensor, finite: Tensor, wishes: Tensor) -> None:
        """Put tokens [num_rows] where the next step and the host read them."""
        self.stage.kernels.put(token_ids, finite, wishes, self.stage.tokens, self.stage.chosen[: len(token_ids)])

    def sample(
        self, step: RowStep, plain: bool, asking: Asking | None, *, guided: bool
    ) -> tuple[npt.NDArray[np.int32], RowLogprobs | None, torch.cuda.Event | None]:
        """Launch the head; the tokens and the logprobs as they will stand on the host, and the event after which they do."""
        count, logprobs = len(step.sampling), None
        if not plain:
            found = self.tail(step, asking, guided=guided)
            logprobs = None if found is None else to_host(found)
        elif not self.graphs.run(GUIDED if guided else HEAD, count):
            (self.guided_head if guided else self.head)(count)
        if self.stage.device.type != "cuda":
            return self.stage.chosen[:count].numpy().copy(), logprobs, None
        host = torch.empty(count, dtype=torch.int32, pin_memory=True)
        host.copy_(self.stage.chosen[:count], non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return host.numpy(), logprobs, arrived

    def tail(self, step: RowStep, asking: Asking | None = None, *, guided: bool = False) -> RowLogprobs | None:
        """In place of ``head``, for rows that ask for anything that the sampler knows, or for logprobs, which it gives."""
        count = len(step.sampling)
        logits = self.decoder.head(self.stage.sampled[:count])  # [num_sampled, vocab] float32
        finite = self.ops.choose(logits)[1]
        logits.masked_fill_(~finite[:, None], 0.0)  # a sampler need not know what to do with NaN
        where = None if asking is None else to_device(asking.places, logits.device)
        raw = None if where is None else logits[where]
        if guided:
            self.ops.rule_out(logits, self.stage.wishes[:count, 0], self.stage.masks)
        rows, positions = step.rows[step.sampling], step.ends[step.sampling]
        token_ids = self.sampler.sample(logits, rows, positions, self.stage.tokens)
        self._put(token_ids, finite, self.stage.wishes[:count])
        if asking is None or raw is None or where is None:
            return None
        return self.ops.logprobs(raw, token_ids[where], asking.most)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run small steps once, so that the first requests do not wait for what torch's libraries load when they are called."""
        self.stage.blank()
        for size, decode in ((1, True), (min(LEAST_MIXED, len(self.stage.token_ids)), False)):
            self.body(size, decode, None)
        self.head(1)

    @torch.inference_mode()
    def prepare_more(self) -> bool:
        """Nothing else is to be done: capture one piece more. False: all are captured."""
        return self.graphs.capture_next()
