"""From options to a runner that is ready: read the model, settle the memory, load, allocate.

Memory is settled before a weight is read: the decoder is first made without storage ("meta" device), which gives the exact size
of its weights on this rank. So a model that cannot fit is refused in a second, and the loaded one never grows.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from minivllm.attention.base import AttnNeed
from minivllm.attention.select import select_backend
from minivllm.config import Config
from minivllm.errors import InvalidOption
from minivllm.kernels.cpu.build import NoNativeKernels, find_or_build
from minivllm.kernels.cpu.library import NativeLibrary
from minivllm.kernels.invariant import check_linear
from minivllm.kernels.ops import FEW_SHAPES, Ops, few_shapes_ops, invariant_ops, native_ops, reference_ops
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
from minivllm.runner.sizing import FEW_SHAPES_BYTES, FixedMemory, Sizes, settle
from minivllm.sampling.sampler import Sampler
from minivllm.types import EngineInfo

MakeSampler = Callable[[int, int, tuple[int, ...]], RowSampler]


def build_runner(config: Config, make_sampler: MakeSampler | None = None) -> tuple[Runner, EngineInfo]:
    """Build the runner of this process; raises ``StartupError`` subclasses.

    ``make_sampler(max_num_seqs, vocab_size, eos_token_ids)``: what chooses tokens; None: ``Sampler``. A test wraps it to
    keep the logits.
    """
    device = _device(config)
    dummy = config.model.load_format == "dummy"
    folder = fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)
    blueprint = read_model(HFConfig.read(folder))
    spec, comm = blueprint.spec, SoloComm()
    dtype = _dtype(config, spec, folder)
    ops, reasons = choose_ops(config, dtype, device)
    if device.type == "cpu":
        _set_threads(config.runner.num_threads or _num_cores(), ops)
    need = _attention_need(config, spec, dtype, device, comm)
    backend, passed_over = select_backend(need, ops)
    setup = Setup(ops, comm, linear_method(config.model.quantization), backend, dtype, device)
    kv = KVShape(need.block_size, need.num_kv_heads, need.head_dim, need.kv_dtype)
    fixed = FixedMemory(_weights_bytes(spec, setup), dtype, FEW_SHAPES_BYTES if ops.name == FEW_SHAPES else 0)
    sizes = settle(config, spec, kv, fixed, device)
    decoder = _load(config, blueprint, setup, folder, sizes)
    if config.runner.batch_invariant and ops.native is None and config.model.quantization == "none":
        _check_invariant(decoder)
    caches = allocate(backend, kv.dtype, spec.num_layers, sizes.num_blocks, device)
    rows = Rows(config.scheduler.max_num_seqs, sizes.max_model_len, config.cache.block_size, 1, device)
    make = make_sampler or partial(Sampler, choose=ops.choose)
    sampler = make(config.scheduler.max_num_seqs, spec.vocab_size, spec.eos_ids)
    runner = Runner(decoder, caches, backend, ops, rows, sampler)
    chosen = f"Attention runs on the {backend.name} backend, other ops on the {ops.name} kernels."
    said = (*spec.notes, *sizes.notes, chosen, *reasons, *passed_over)
    return runner, _engine_info(config, setup, runner, sizes, said)


def _engine_info(config: Config, setup: Setup, runner: Runner, sizes: Sizes, notes: tuple[str, ...]) -> EngineInfo:
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
        device=str(runner.rows.tokens.device),
        dtype=str(setup.dtype).removeprefix("torch."),
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


def choose_ops(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Ops, tuple[str, ...]]:
    """The way of computing that fits the options and the machine, and why it is not the fast one. Raises ``InvalidOption``."""
    reasons: tuple[str, ...] = ()
    if device.type == "cpu" and config.runner.cpu_kernels != "torch":
        try:
            return native_ops(NativeLibrary(find_or_build())), ()
        except NoNativeKernels as reason:
            if config.runner.cpu_kernels == "native":
                raise InvalidOption(f"--cpu-kernels native cannot be had here: {reason}; use --cpu-kernels auto.") from None
            reasons = (f"The native CPU kernels are not used: {reason}. Torch's serve, several times more slowly.",)
    if config.runner.batch_invariant:
        return invariant_ops(), reasons
    if device.type != "cpu" or dtype.itemsize != 2:
        return reference_ops(), reasons
    if f"amx_{'bf16' if dtype == torch.bfloat16 else 'fp16'}" not in _cpu_flags():
        reasons += (
            "Torch has no matrix instructions for 16-bit numbers on this CPU, so prompts may run slower than with --dtype "
            "float32, which takes twice the memory.",
        )
    return few_shapes_ops(), reasons


def _set_threads(num_threads: int, ops: Ops) -> None:
    """Give the threads to whoever computes: the native kernels' pool (torch then stays on the caller's thread), or torch's."""
    if ops.native is not None:
        ops.native.set_threads(num_threads)
    torch.set_num_threads(1 if ops.native is not None else num_threads)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(config: Config, spec: ModelSpec, folder: Path) -> torch.dtype:
    """The precision to compute in."""
    name: str | None = config.model.dtype
    if name == "auto":
        name = spec.dtype
        if name is None and config.model.load_format != "dummy":
            name = checkpoint_dtype(folder)
    return DTYPES.get(name or "float32", torch.float32)


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
