"""Running the ladder: the same requests on rung after rung, and what each left behind.

Every rung is warmed up with requests of its own, begins with nothing kept, and is timed at the desk alone.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivllm.config import Config, make_config
from minivllm.errors import NotEnoughMemory
from minivllm.learn import engine_rungs
from minivllm.learn.agreement import compare
from minivllm.learn.arithmetic import Cost, total
from minivllm.learn.desk import Desk, Request
from minivllm.learn.model import Model, load_model
from minivllm.learn.result import Agreement, Ladder, Machine, ModelFacts, Percentiles, RungResult
from minivllm.learn.roofline import Roofline, measure
from minivllm.learn.rungs import PLAIN, Rung
from minivllm.learn.workload import Workload
from minivllm.models.hf_config import HFConfig
from minivllm.models.hub import fetch_model
from minivllm.models.registry import read_model
from minivllm.models.spec import ModelSpec
from minivllm.runner.choose import num_cores

LEAST_STEP_TOKENS = 2048  # of the rungs without chunks: several whole prompts
NO_ROOM = "It did not fit into the device's memory; lower --batch-size or the lengths."
NO_GRAPHS = "CUDA graphs need a GPU, and this ran on a CPU."


@dataclass(frozen=True)
class Settings:
    """How the ladder is run."""

    batch_size: int = 8
    chunk_tokens: int = 64
    max_rung_s: float = 20.0
    rounds: int = 1


@dataclass(frozen=True)
class Served:
    """What one rung's run gave."""

    taken: Sequence[Request]
    elapsed_s: float
    costs: Sequence[Cost]
    recomputed: int
    found: int = 0
    options: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return sum(len(request.output) for request in self.taken) / self.elapsed_s


def run(
    options: Mapping[str, Any], workload: Workload, settings: Settings, rungs: Sequence[Rung], tell: Callable[[str], None]
) -> Ladder:
    """Run ``rungs``; ``options`` are the engine's that all share (model, dtype, device, ...), ``tell`` hears of each rung's
    end. Raises ``StartupError``."""
    return _Run(options, workload, settings, tell).climb(rungs)


class _Run:
    """One run of the ladder. Written by its own methods."""

    def __init__(
        self, options: Mapping[str, Any], workload: Workload, settings: Settings, tell: Callable[[str], None]
    ) -> None:
        self.workload, self.settings, self.tell = workload, settings, tell
        self.config: Config = make_config(**options)
        folder = _folder(self.config)
        self.spec: ModelSpec = read_model(HFConfig.read(folder)).spec
        workload.check_fits(self.spec.max_positions)
        self.threads = self.config.runner.num_threads or num_cores()
        torch.set_num_threads(self.threads)
        self.model: Model = load_model(self.config, workload.longest)
        blocks = -(-workload.longest // self.config.cache.block_size)
        self.base = {
            **options,
            "max_model_len": workload.longest,
            "max_num_batched_tokens": max(LEAST_STEP_TOKENS, workload.longest_prompt, settings.batch_size),
            "num_gpu_blocks_override": 1 + 2 * settings.batch_size * blocks,
        }
        self.avoid = {i for i in (self.spec.bos_id, *self.spec.eos_ids) if i is not None}

    def climb(self, rungs: Sequence[Rung]) -> Ladder:
        """Run every rung, round after round; of each, the fastest run counts."""
        sizes, dtype = self.model.meter.sizes, self.model.decoder.final_norm.weight.dtype
        roofline: Roofline | None = None
        fastest: dict[str, Served | str] = {}
        for _ in range(self.settings.rounds):
            torch.set_num_threads(self.threads)
            roofline = measure(self.model.device, dtype, sizes.weight_bytes).best(roofline)
            for rung in rungs:
                served = self._serve(rung)
                self.tell(_line(rung, served, self.workload.num_requests))
                best = fastest.get(rung.name)
                if isinstance(best, Served) and isinstance(served, Served) and best.tokens_per_s > served.tokens_per_s:
                    continue
                fastest[rung.name] = served
        if roofline is None:
            raise ValueError("the ladder needs one round at least")
        texts: list[dict[str, Request]] = []
        results = []
        for rung in rungs:
            served = fastest[rung.name]
            if isinstance(served, str):
                results.append(RungResult(name=rung.name, title=rung.title, idea=rung.idea, left_out=served))
                continue
            results.append(_result(rung, served, roofline, compare(self.model, served.taken, texts)))
            texts.append({request.id: request for request in served.taken})
        s = self.settings
        machine, facts = self._machine(roofline), self._facts()
        return Ladder(machine, facts, self.workload, s.batch_size, s.chunk_tokens, s.max_rung_s, s.rounds, tuple(results))

    def _serve(self, rung: Rung) -> Served | str:
        """Run a rung once; a sentence where this machine cannot show it."""
        if rung.name == "7" and self.model.device.type != "cuda":
            return NO_GRAPHS
        try:
            return self._plain(rung) if rung.name in PLAIN else self._engine(rung)
        except (torch.OutOfMemoryError, NotEnoughMemory):
            return NO_ROOM
        finally:
            gc.collect()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _desk(self) -> Desk:
        return Desk(self.workload.requests(self.spec.vocab_size, self.avoid), self.settings.max_rung_s)

    def _warm_up_requests(self) -> list[Request]:
        """A batch of other prompts, as long as the real ones, for a few tokens each."""
        other = replace(
            self.workload, seed=self.workload.seed + 1, num_requests=self.settings.batch_size, request_rate=0.0,
            output_len=min(2, self.workload.output_len), spread=0.0,
        )  # fmt: skip
        return other.requests(self.spec.vocab_size, self.avoid)

    def _plain(self, rung: Rung) -> Served:
        """One of the small programs."""
        torch.set_num_threads(self.threads)  # an engine with kernels of its own leaves torch one
        serve = import_module(f"minivllm.learn.rung{rung.name}").serve
        few = self._warm_up_requests()
        serve(self.model, Desk(few if rung.name in ("2", "3") else few[:1], 60.0), self.settings.batch_size)
        self.model.meter.costs.clear()
        desk = self._desk()
        serve(self.model, desk, self.settings.batch_size)
        costs = tuple(self.model.meter.costs)
        again = sum(c.tokens - c.padding for c in costs) - _needed(desk.taken)
        return Served(desk.taken, desk.busy_s, costs, again)

    def _engine(self, rung: Rung) -> Served | str:
        """The engine with this rung's options; a sentence where this machine cannot show the difference."""
        options = engine_rungs.engine_options(rung.name, self.settings.batch_size, self.settings.chunk_tokens)
        engine = engine_rungs.start(self.base, options)
        notes = engine.info.notes
        if rung.name == "4k" and (slow := [note for note in notes if "Torch's serve" in note]):
            return slow[0]
        engine_rungs.warm_up(engine, self._warm_up_requests())
        desk = self._desk()
        records = engine_rungs.serve(engine, desk, self.settings.batch_size)
        run = engine_rungs.measured(records, self.model.meter.sizes, notes)
        return Served(desk.taken, desk.busy_s, run.costs, run.recomputed, run.found, options, notes)

    def _machine(self, roofline: Roofline) -> Machine:
        device = self.model.device
        plural = "s" if self.threads > 1 else ""
        cpu = f"{_cpu_name()}, {self.threads} thread{plural}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        return Machine(name, self.threads, str(torch.__version__), roofline.flops_per_s, roofline.bytes_per_s)

    def _facts(self) -> ModelFacts:
        decoder, sizes = self.model.decoder, self.model.meter.sizes
        return ModelFacts(
            name=self.config.served_names[0].rpartition("/")[2],
            architecture=self.spec.architecture,
            params=sum(p.numel() for p in decoder.parameters()),
            layers=self.spec.num_layers,
            dtype=str(decoder.final_norm.weight.dtype).removeprefix("torch."),
            weight_bytes=sizes.weight_bytes,
            kv_bytes=sizes.kv_bytes,
            random=self.config.model.load_format == "dummy",
        )


def _result(rung: Rung, served: Served, roofline: Roofline, agreement: Agreement) -> RungResult:
    """A rung's figures from its run."""
    taken = served.taken
    least = [(roofline.least_s(c.flops, c.bytes_moved), c) for c in served.costs]
    waiting = [s for s, c in least if c.flops < c.bytes_moved * roofline.ridge]
    return RungResult(
        name=rung.name,
        title=rung.title,
        idea=rung.idea,
        options=dict(served.options or {}),
        requests=len(taken),
        cut=sum(request.cut for request in taken),
        output_tokens=sum(len(r.output) for r in taken),
        needed=_needed(taken),
        recomputed=served.recomputed,
        found=served.found,
        elapsed_s=served.elapsed_s,
        cost=total(served.costs),
        predicted_s=sum(s for s, _ in least),
        memory_s=sum(waiting),
        ttft_s=_percentiles([r.told_s[0] - r.arrival_s for r in taken]),
        itl_s=_percentiles([b - a for r in taken for a, b in pairwise(r.told_s)]),
        agreement=agreement,
        notes=served.notes,
    )


def _needed(requests: Sequence[Request]) -> int:
    """Tokens that have to be computed once."""
    return sum(len(r.prompt) + len(r.output) - 1 for r in requests)


def _percentiles(times_s: Sequence[float]) -> Percentiles:
    if not times_s:
        return Percentiles(0.0, 0.0)
    p50, p99 = np.percentile(times_s, (50, 99))
    return Percentiles(float(p50), float(p99))


def _line(rung: Rung, served: Served | str, num_requests: int) -> str:
    """What is told of a rung when it is done."""
    name = f"rung {rung.name:<2} {rung.title}"
    if isinstance(served, str):
        return f"{name}: left out. {served}"
    count = len(served.taken)
    part = "" if count == num_requests else f" ({count} of {num_requests} requests, then its time was over)"
    return f"{name}: {served.tokens_per_s:,.1f} tokens/s in {served.elapsed_s:.1f} s{part}"


def _folder(config: Config) -> Path:
    dummy = config.model.load_format == "dummy"
    return fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)


def _cpu_name() -> str:
    """The CPU as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
