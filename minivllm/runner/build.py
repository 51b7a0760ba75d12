"""From options to a runner that is ready: read the model, settle the memory, load, allocate.

Memory is settled before a weight is read: the decoder is first made without storage ("meta" device), which gives the exact size
of its weights on this rank. So a model that cannot fit is refused in a second, and the loaded one never grows.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from minivllm.attention.base import AttnNeed
from minivllm.attention.select import select_backend
from minivllm.config import Config
from minivllm.errors import InvalidOption
from minivllm.kernels.invariant import check_linear
from minivllm.kernels.ops import Ops, few_shapes_ops, invariant_ops, reference_ops
from minivllm.layers.linear import head_share
from minivllm.layers.setup import Setup
from minivllm.models.decoder import Decoder
from minivllm.models.hf_config import HFConfig
from minivllm.models.hub import fetch_model
from minivllm.models.registry import read_model
from minivllm.models.spec import Blueprint, ModelSpec
from minivllm.parallel.comm import Comm, SoloComm
from minivllm.quant.base import linear_method
from minivllm.runner.kv_cache import KVShape, allocate
from minivllm.runner.loader import DTYPES, checkpoint_dtype, load_checkpoint, load_dummy
from minivllm.runner.rows import Rows
from minivllm.runner.runner import RowSampler, Runner
from minivllm.runner.sizing import Sizes, settle
from minivllm.sampling.sampler import Sampler
from minivllm.types import EngineInfo

MakeSampler = Callable[[int, int, tuple[int, ...]], RowSampler]


def build_runner(config: Config, make_sampler: MakeSampler | None = None) -> tuple[Runner, EngineInfo]:
    """Build the runner of this process; raises ``StartupError`` subclasses.

    ``make_sampler(max_num_seqs, vocab_size, eos_token_ids)``: what chooses tokens; None: ``Sampler``. A test wraps it to
    keep the logits.
    """
    device = _device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.runner.num_threads or _num_cores())
    dummy = config.model.load_format == "dummy"
    folder = fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)
    blueprint = read_model(HFConfig.read(folder))
    spec, comm = blueprint.spec, SoloComm()
    dtype, notes = _dtype(config, spec, folder, device)
    ops = _ops(config, dtype, device)
    backend, passed_over = select_backend(_attention_need(config, spec, dtype, device, comm), ops)
    setup = Setup(ops, comm, linear_method(config.model.quantization), backend, dtype, device)
    kv_heads = head_share(spec.num_heads, spec.num_kv_heads, comm).num_kv_heads
    kv = KVShape(config.cache.block_size, kv_heads, spec.head_dim, dtype)
    sizes = settle(config, spec, kv, _weights_bytes(spec, setup), device)
    decoder = _load(config, blueprint, setup, folder, sizes)
    if config.runner.batch_invariant:
        _check_invariant(decoder)
    caches = allocate(kv, spec.num_layers, sizes.num_blocks, device)
    rows = Rows(config.scheduler.max_num_seqs, sizes.max_model_len, config.cache.block_size, 1, device)
    sampler = (make_sampler or Sampler)(config.scheduler.max_num_seqs, spec.vocab_size, spec.eos_ids)
    runner = Runner(decoder, caches, backend, ops, rows, sampler)
    chosen = f"Attention runs on the {backend.name} backend, other ops on the {ops.name} kernels."
    return runner, _engine_info(config, spec, runner, sizes, (*spec.notes, *notes, *sizes.notes, chosen, *passed_over))


def _engine_info(config: Config, spec: ModelSpec, runner: Runner, sizes: Sizes, notes: tuple[str, ...]) -> EngineInfo:
    """What was settled, for the engine and its users."""
    weight = runner.decoder.embedding.weight
    return EngineInfo(
        max_model_len=sizes.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=sizes.num_blocks,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_ids,
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        weights_bytes=sum(p.nbytes for p in runner.decoder.parameters()),
        kv_bytes=sizes.kv_bytes,
        workspace_bytes=sizes.workspace_bytes,
        notes=notes,
    )


def _device(config: Config) -> torch.device:
    """The device to run on; raises ``InvalidOption`` for one that is not there."""
    there = torch.cuda.is_available()
    if config.runner.device == "cuda" and not there:
        raise InvalidOption("--device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if there and config.runner.device != "cpu" else "cpu")


def _ops(config: Config, dtype: torch.dtype, device: torch.device) -> Ops:
    """The way of computing that fits the options and the device."""
    if config.runner.batch_invariant:
        return invariant_ops()
    return few_shapes_ops() if device.type == "cpu" and dtype.itemsize == 2 else reference_ops()


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(config: Config, spec: ModelSpec, folder: Path, device: torch.device) -> tuple[torch.dtype, tuple[str, ...]]:
    """The precision to compute in, and a note where it is slow here."""
    name: str | None = config.model.dtype
    if name == "auto":
        name = spec.dtype
        if name is None and config.model.load_format != "dummy":
            name = checkpoint_dtype(folder)
        if name not in DTYPES:
            name = "float32"
    dtype = DTYPES[name or "float32"]
    if device.type == "cpu" and dtype.itemsize == 2 and f"amx_{'bf16' if name == 'bfloat16' else 'fp16'}" not in _cpu_flags():
        note = (
            f"This CPU has no matrix instructions for {name}, so prompts may run slower than with --dtype float32, which takes "
            "twice the memory."
        )
        return dtype, (note,)
    return dtype, ()


def _cpu_flags() -> frozenset[str]:
    """The CPU's features, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


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
        device=device,
        batch_invariant=config.runner.batch_invariant,
    )


def _weights_bytes(spec: ModelSpec, setup: Setup) -> int:
    """Bytes of this rank's weights, from a decoder without storage."""
    bare = Setup(setup.ops, setup.comm, setup.method, setup.attention, setup.dtype, torch.device("meta"))
    return sum(p.nbytes for p in Decoder(spec, bare, 1).parameters())


def _load(config: Config, blueprint: Blueprint, setup: Setup, folder: Path, sizes: Sizes) -> Decoder:
    """Make the decoder and fill it."""
    decoder = Decoder(blueprint.spec, setup, sizes.max_model_len)
    if config.model.load_format == "dummy":
        load_dummy(decoder, blueprint.names, config.model.seed)
    else:
        load_checkpoint(decoder, blueprint.names, folder)
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
