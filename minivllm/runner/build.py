"""From options to a runner that is ready: read the model, settle the memory, load, allocate.

Memory is settled before a weight is read: the decoder is first made without storage ("meta" device), which gives the exact size
of its weights on this rank. So a model that cannot fit is refused in a second, and the loaded one never grows.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minivllm.attention.base import AttnNeed
from minivllm.attention.select import select_backend
from minivllm.config import Config
from minivllm.errors import InvalidOption
from minivllm.kernels.invariant import check_linear
from minivllm.kernels.ops import FEW_SHAPES
from minivllm.layers.linear import head_share
from minivllm.layers.setup import Setup
from minivllm.models.decoder import Decoder
from minivllm.models.hf_config import HFConfig
from minivllm.models.hub import fetch_model
from minivllm.models.registry import read_model
from minivllm.models.spec import Blueprint, ModelSpec
from minivllm.parallel.comm import Comm, SoloComm
from minivllm.quant.base import linear_method
from minivllm.runner.choose import choose_device, choose_dtype, choose_ops, set_threads
from minivllm.runner.kv_cache import KVShape, allocate
from minivllm.runner.loader import DTYPES, load_checkpoint, load_dummy
from minivllm.runner.rows import Rows, TokenTable
from minivllm.runner.runner import AnyRunner, Loaded, MakeSampler, Runner
from minivllm.runner.sizing import FEW_SHAPES_BYTES, FixedMemory, Sizes, resettle, settle
from minivllm.sampling.sampler import Sampler
from minivllm.types import EngineInfo

log = logging.getLogger("minivllm")


@dataclass(frozen=True)
class Prepared:
    """All that is settled before anything is computed. For a CPU the weights are there too, and no thread was started: a
    process in this state can be forked (``engine/zygote.py``), and its forks share them."""

    folder: Path
    blueprint: Blueprint
    setup: Setup
    need: AttnNeed
    kv: KVShape
    sizes: Sizes
    notes: tuple[str, ...]
    decoder: Decoder | None  # None: not loaded


def prepare(config: Config) -> Prepared:
    """Read the model, settle the memory, and for a CPU load the weights; raises ``StartupError`` subclasses."""
    device = choose_device(config)
    dummy = config.model.load_format == "dummy"
    folder = fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)
    blueprint = read_model(HFConfig.read(folder))
    spec, comm = blueprint.spec, SoloComm()
    dtype = choose_dtype(config, spec, folder)
    ops, reasons = choose_ops(config, dtype, device)
    if device.type == "cpu":
        set_threads(1, ops)
    need = _attention_need(config, spec, dtype, device, comm)
    backend, passed_over = select_backend(need, ops)
    setup = Setup(ops, comm, linear_method(config.model.quantization), backend, dtype, device)
    kv = KVShape(need.block_size, need.num_kv_heads, need.head_dim, need.kv_dtype)
    fixed = FixedMemory(_weights_bytes(spec, setup), dtype, FEW_SHAPES_BYTES if ops.name == FEW_SHAPES else 0)
    sizes = settle(config, spec, kv, fixed, device)
    decoder = _load(config, blueprint, setup, folder, sizes) if device.type == "cpu" else None
    chosen = f"Attention runs on the {backend.name} backend, other ops on the {ops.name} kernels."
    notes = (*spec.notes, *sizes.notes, chosen, *reasons, *passed_over)
    return Prepared(folder, blueprint, setup, need, kv, sizes, notes, decoder)


def build_runner(
    config: Config, make_sampler: MakeSampler | None = None, prepared: Prepared | None = None
) -> tuple[AnyRunner, EngineInfo]:
    """Build the runner of this process; raises ``StartupError`` subclasses.

    ``make_sampler(max_num_seqs, vocab_size, eos_token_ids)``: what chooses tokens; None: the device's own. A test wraps it to
    keep the logits. ``prepared``: by ``prepare`` with these options; None: here.
    """
    ready = prepared or prepare(config)
    setup, sizes, spec = ready.setup, ready.sizes, ready.blueprint.spec
    if setup.device.type == "cpu":
        set_threads(config.runner.num_threads, setup.ops)
    kernels_are_ready = _rehearse(config, spec, setup, ready.need, ready.kv, sizes)
    decoder = ready.decoder or _load(config, ready.blueprint, setup, ready.folder, sizes)
    kernels_are_ready()
    ops = setup.ops
    if config.runner.batch_invariant and ops.native is None and ops.chip is None and config.model.quantization == "none":
        _check_invariant(decoder)
    build = _device_runner if hasattr(setup.attention, "plan_on_device") else _host_runner
    runner, settled = build(config, decoder, setup, ready.kv, sizes, make_sampler)
    later = tuple(note for note in settled.notes if note not in sizes.notes)
    return runner, _engine_info(config, setup, runner, settled, (*ready.notes, *later))


def _host_runner(
    config: Config, decoder: Decoder, setup: Setup, kv: KVShape, sizes: Sizes, make_sampler: MakeSampler | None
) -> tuple[AnyRunner, Sizes]:
    """The runner that plans on the host, on any device."""
    spec, most = decoder.spec, config.scheduler.max_num_seqs
    caches = allocate(setup.attention, kv.dtype, spec.num_layers, sizes.num_blocks, setup.device)
    table = TokenTable(most, sizes.max_model_len, setup.device)
    rows = Rows(most, sizes.max_model_len, kv.block_size, 1, table)
    make = make_sampler or partial(Sampler, choose=setup.ops.choose)
    sampler = make(most, spec.vocab_size, spec.eos_ids)
    return Runner(Loaded(decoder, caches, setup.attention, setup.ops), rows, table, sampler), sizes


def _device_runner(
    config: Config, decoder: Decoder, setup: Setup, kv: KVShape, sizes: Sizes, make_sampler: MakeSampler | None
) -> tuple[AnyRunner, Sizes]:
    """The runner that stays ahead of its device. Its cache is sized after a measured run of the largest step."""
    from minivllm.runner.build_device import RunnerSizes, make_runner
    from minivllm.runner.device_runner import captured_sizes
    from minivllm.runner.dry_run import measure

    largest, on_gpu = RunnerSizes.of(config, sizes), setup.device.type == "cuda"
    captured = on_gpu and not config.runner.enforce_eager
    shares = getattr(setup.attention, "shared_shape", None) is not None
    graphs = captured_sizes(largest.max_num_seqs, largest.max_num_tokens, shares=shares) if captured else {}
    runner = make_runner(decoder, setup, kv, largest, make_sampler, graphs)
    num_layers = decoder.spec.num_layers
    if on_gpu:
        sizes = resettle(config, sizes, kv.block_bytes(num_layers), measure(runner, largest.max_num_tokens), setup.device)
    runner.caches = allocate(setup.attention, kv.dtype, num_layers, sizes.num_blocks, setup.device)
    if on_gpu:
        runner.warm_up()
    return runner, sizes


def _rehearse(config: Config, spec: ModelSpec, setup: Setup, need: AttnNeed, kv: KVShape, sizes: Sizes) -> Callable[[], None]:
    """Begin to compile kernels in the background, where there are some; to be called: what waits for the end of it."""
    if setup.device.type != "cuda" or not hasattr(setup.attention, "plan_on_device"):
        return lambda: None
    from minivllm.runner.build_device import Rehearsal, RunnerSizes

    return Rehearsal(spec, setup, need, kv, RunnerSizes.of(config, sizes)).wait


def _engine_info(config: Config, setup: Setup, runner: AnyRunner, sizes: Sizes, notes: tuple[str, ...]) -> EngineInfo:
    """What was settled, for the engine and its users."""
    spec = runner.decoder.spec
    return EngineInfo(
        max_model_len=sizes.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=sizes.num_blocks,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_ids,
        device=str(setup.device),
        dtype=str(setup.dtype).removeprefix("torch."),
        weights_bytes=sum(p.nbytes for p in runner.decoder.parameters()),
        kv_bytes=sizes.kv_bytes,
        workspace_bytes=sizes.workspace_bytes,
        notes=notes,
    )


def _attention_need(config: Config, spec: ModelSpec, dtype: torch.dtype, device: torch.device, comm: Comm) -> AttnNeed:
    """What the model asks of an attention backend on this rank."""
    heads = head_share(spec.num_heads, spec.num_kv_heads, comm)
    return AttnNeed(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=spec.head_dim,
        windows=tuple(dict.fromkeys(spec.windows)),
        block_size=config.cache.block_size,
        dtype=dtype,
        kv_dtype=dtype if config.cache.kv_cache_dtype == "auto" else DTYPES[config.cache.kv_cache_dtype],
        device=device,
        batch_invariant=config.runner.batch_invariant,
    )


def _weights_bytes(spec: ModelSpec, setup: Setup) -> int:
    """Bytes of this rank's weights, from a decoder without storage."""
    bare = Setup(setup.ops, setup.comm, setup.method, setup.attention, setup.dtype, torch.device("meta"))
    return sum(p.nbytes for p in Decoder(spec, bare, 1).parameters())


def _load(config: Config, blueprint: Blueprint, setup: Setup, folder: Path, sizes: Sizes) -> Decoder:
    """Make the decoder and fill it."""
    begin_s = time.monotonic()
    decoder = Decoder(blueprint.spec, setup, sizes.max_model_len)
    if config.model.load_format == "dummy":
        load_dummy(decoder, blueprint.names, config.model.seed)
    else:
        load_checkpoint(decoder, blueprint.names, folder)
    log.info("The weights were loaded in %.1f s.", time.monotonic() - begin_s)
    return decoder


def _check_invariant(decoder: Decoder) -> None:
    """Try every shape of matrix once; raises ``InvalidOption`` where this machine's libraries do not keep rows apart."""
    matrices = {tuple(p.shape): p for p in decoder.parameters() if p.ndim == 2}
    for shape, weight in matrices.items():
        if not check_linear(weight):
            raise InvalidOption(
                f"--batch-invariant cannot be kept here: products with a matrix of {shape[0]} x {shape[1]} depend on the "
                "batch; use another --num-threads or --dtype."
            )
