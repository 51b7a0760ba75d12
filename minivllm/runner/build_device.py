"""The runner of a GPU, and the background work that has its kernels ready when it is.

While weights are read, a copy of the runner that has no memory (torch's "meta" device) is led through steps of every kind, so
that all their kernels are compiled at once (``kernels/triton/rehearsal.py``).
"""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread
from typing import cast

import torch

from minivllm.attention.base import AttnNeed, DeviceAttention
from minivllm.attention.triton import TritonAttention
from minivllm.config import Config
from minivllm.kernels.ops import triton_ops
from minivllm.kernels.triton.chip import Chip, Launch
from minivllm.kernels.triton.cutoff import Cutoff
from minivllm.kernels.triton.logprobs import TOPS
from minivllm.kernels.triton.rehearsal import compile_all, fork_helpers
from minivllm.kernels.triton.sampling import NUM_WISHES, Draw
from minivllm.kernels.triton.steps import StepKernels
from minivllm.layers.setup import Setup
from minivllm.models.decoder import Decoder
from minivllm.models.spec import ModelSpec
from minivllm.runner.device_runner import LEAST_MIXED, Captured, DeviceRunner
from minivllm.runner.kv_cache import KVShape, allocate
from minivllm.runner.page import RUN_FIELDS, Runs
from minivllm.runner.rows import Rows
from minivllm.runner.runner import Loaded, MakeSampler
from minivllm.runner.seating import most_items
from minivllm.runner.sizing import Sizes
from minivllm.runner.stage import Stage, StageSizes
from minivllm.sampling.device import DeviceSampler

log = logging.getLogger("minivllm")


@dataclass(frozen=True)
class RunnerSizes:
    """What a runner's tables are sized by."""

    max_num_seqs: int
    max_num_tokens: int  # of a step
    max_model_len: int

    @staticmethod
    def of(config: Config, sizes: Sizes) -> "RunnerSizes":
        """The sizes that were settled."""
        most = config.scheduler.max_num_seqs
        tokens = min(config.scheduler.max_num_batched_tokens, most * sizes.max_model_len)
        return RunnerSizes(most, tokens, sizes.max_model_len)


def make_runner(
    decoder: Decoder, setup: Setup, kv: KVShape, sizes: RunnerSizes, make_sampler: MakeSampler | None, graphs: Captured
) -> DeviceRunner:
    """A runner over a cache of two blocks."""
    if (chip := setup.ops.chip) is None:
        raise ValueError("this runner needs ops with Triton's kernels")
    spec, most = decoder.spec, sizes.max_num_seqs
    runs, draw = Runs(), Draw(chip)
    rows = Rows(most, sizes.max_model_len, kv.block_size, 1, runs)
    items = most_items(most, cast(DeviceAttention, setup.attention).shared_shape)
    stage_sizes = StageSizes(most, sizes.max_num_tokens, sizes.max_model_len, spec.hidden_size, spec.vocab_size, items)
    stage = Stage(stage_sizes, rows, StepKernels(chip, kv.block_size, most), setup.dtype, setup.device)
    make = make_sampler or partial(DeviceSampler, kernels=(draw, Cutoff(chip)))
    scratch = allocate(setup.attention, kv.dtype, spec.num_layers, 2, setup.device)
    loaded = Loaded(decoder, scratch, setup.attention, setup.ops)
    return DeviceRunner(loaded, rows, runs, make(most, spec.vocab_size, spec.eos_ids), stage, draw, graphs)


class Rehearsal:
    """Kernels that are being compiled in the background. Driven by whoever builds the runner."""

    def __init__(self, spec: ModelSpec, setup: Setup, need: AttnNeed, kv: KVShape, sizes: RunnerSizes) -> None:
        self._play = partial(play, spec, setup, need, kv, sizes)
        self._title = title_of(spec, setup, need, kv, sizes)
        self._helpers = fork_helpers()  # before this very thread
        self._thread = Thread(target=self._run, name="rehearsal", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begin_s = time.monotonic()
        try:
            count = compile_all(self._play, self._title, self._helpers)
        except Exception:  # nothing is lost: a kernel that is missing is compiled by its first launch, or says why it cannot be
            log.warning("Not every kernel could be compiled beforehand.", exc_info=True)
        else:
            log.info("%d kernels were ready after %.1f s.", count, time.monotonic() - begin_s)
        finally:
            if self._helpers is not None:
                self._helpers.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Return when all are ready."""
        self._thread.join()


def title_of(spec: ModelSpec, setup: Setup, need: AttnNeed, kv: KVShape, sizes: RunnerSizes) -> str:
    """All that the runner's kernels depend on, as text that is the same at every start."""
    return f"{setup.ops.chip} {setup.ops.name} {setup.dtype} {setup.method.name} {spec} {need} {kv} {sizes}"


@torch.inference_mode()
def play(spec: ModelSpec, setup: Setup, need: AttnNeed, kv: KVShape, sizes: RunnerSizes, launch: Launch) -> None:
    """Lead a runner without memory through steps of all kinds. Every launch of ours goes to ``launch``."""
    if (real := setup.ops.chip) is None:
        raise ValueError("this rehearsal needs ops with Triton's kernels")
    nowhere, chip = torch.device("meta"), replace(real, launch=launch)
    ops = triton_ops(chip, need.batch_invariant)
    attention = TritonAttention(replace(need, device=nowhere), ops)
    less = Setup(ops, setup.comm, setup.method, attention, setup.dtype, nowhere)
    decoder = Decoder(_each_layer_once(spec), less, 1)
    for module in decoder.modules():
        if callable(finish := getattr(module, "finish", None)):
            finish()
    runner = make_runner(decoder, less, kv, sizes, None, {})
    stage = runner.stage
    stage.kernels.scatter(stage.page, stage.page[: 2 * RUN_FIELDS].view(2, RUN_FIELDS), 1, stage.tokens, stage.blocks)
    for num_rows in doublings(1, sizes.max_num_seqs):
        _body(runner, num_rows, decode=True)
        if attention.shared_shape is not None:
            _body(runner, num_rows, decode=True, shared=True)
        runner.head(num_rows)
        _filters(runner, chip, num_rows)
    for num_tokens in doublings(min(LEAST_MIXED, sizes.max_num_tokens), sizes.max_num_tokens):
        _body(runner, num_tokens, decode=False)


def _body(runner: DeviceRunner, num_tokens: int, *, decode: bool, shared: bool = False) -> None:
    """As ``DeviceRunner.body``, but for what torch does after it."""
    runner.decoder.body(runner.stage.batch(num_tokens, decode, runner.backend, None, shared), runner.caches)


def _filters(runner: DeviceRunner, chip: Chip, num_rows: int) -> None:
    """What rows that ask for min_p, top_k and top_p are drawn with, each alone and all at once; logprobs; and masks."""
    hidden = runner.stage.sampled[:num_rows]
    logits = hidden.new_empty((num_rows, runner.decoder.spec.vocab_size), dtype=torch.float32)
    numbers, counts = logits[:, 0].contiguous(), logits.new_empty(num_rows, dtype=torch.int32)
    wishes = logits.new_empty((num_rows, NUM_WISHES), dtype=torch.int32)
    cutoff, draw = Cutoff(chip), Draw(chip)
    runner.ops.choose(logits)
    draw.draw(logits, wishes, masked=True)
    for asked in ((counts, None, None), (None, numbers, None), (None, None, numbers), (counts, numbers, numbers)):
        draw.draw(logits, wishes, cutoff.lowest_kept(logits, numbers, *asked), masked=True)
    chosen = counts.to(torch.int64)
    for num_top in TOPS:
        runner.ops.logprobs(logits, chosen, min(num_top, logits.shape[1]))
    runner.ops.rule_out(logits, wishes[:, 0], runner.stage.masks)


def _each_layer_once(spec: ModelSpec) -> ModelSpec:
    """The model with the fewest layers that launch all that its own do: the first, which adds no residual, and each kind."""
    windows = (spec.windows[0], *dict.fromkeys(spec.windows))
    return replace(spec, num_layers=len(windows), windows=windows)


def doublings(first: int, last: int) -> tuple[int, ...]:
    """first, twice that, and so on, and last: a kernel is chosen by such steps."""
    sizes = [first]
    while 2 * sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return (*sizes, last)
