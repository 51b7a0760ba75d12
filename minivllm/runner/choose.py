"""What computes: the device, the precision, and the table of kernels, from the options and from what the machine has."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from minivllm.config import Config
from minivllm.errors import InvalidOption
from minivllm.kernels.cpu.build import NoNativeKernels, find_or_build
from minivllm.kernels.cpu.library import NativeLibrary
from minivllm.kernels.ops import Ops, few_shapes_ops, invariant_ops, native_ops, reference_ops, triton_ops
from minivllm.models.spec import ModelSpec
from minivllm.runner.loader import DTYPES, checkpoint_dtype


def choose_device(config: Config) -> torch.device:
    """The device to run on; raises ``InvalidOption`` for one that is not there."""
    there = torch.cuda.is_available()
    if config.runner.device == "cuda" and not there:
        raise InvalidOption("--device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if there and config.runner.device != "cpu" else "cpu")


def choose_ops(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Ops, tuple[str, ...]]:
    """The way of computing that fits the options and the machine, and why it is not the fast one. Raises ``InvalidOption``."""
    if (reason := _no_triton(config, dtype, device)) is None:
        from minivllm.kernels.triton.chip import this_chip

        return triton_ops(this_chip(device), config.runner.batch_invariant), ()
    reasons: tuple[str, ...] = (reason,) if device.type == "cuda" else ()
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


def set_threads(asked: int | None, ops: Ops) -> None:
    """Give the threads to whoever computes: the native kernels' pool (torch then stays on the caller's thread), or torch's."""
    num_threads = asked or num_cores()
    if ops.native is not None:
        ops.native.set_threads(num_threads)
    torch.set_num_threads(1 if ops.native is not None else num_threads)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_dtype(config: Config, spec: ModelSpec, folder: Path) -> torch.dtype:
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


def _no_triton(config: Config, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton's kernels do not serve; None: they do. Raises ``InvalidOption`` where they were asked for."""
    asked = config.runner.gpu_kernels
    if asked == "torch" or (asked == "auto" and device.type != "cuda"):
        return "The Triton kernels are not used: --gpu-kernels torch was asked for. Torch's serve, several times more slowly."
    reason = None
    if find_spec("triton") is None:
        reason = "triton is not installed"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reason = "they need compute capability 8.0 or later"
    elif device.type != "cuda" and not _interpreting():
        reason = "on a CPU they run in Triton's interpreter only, which TRITON_INTERPRET=1 turns on"
    if reason is not None and asked == "triton":
        raise InvalidOption(f"--gpu-kernels triton cannot be had here: {reason}; use --gpu-kernels auto.")
    return reason and f"The Triton kernels are not used: {reason}. Torch's serve, several times more slowly."


def _interpreting() -> bool:
    """Whether Triton runs kernels as Python."""
    import triton

    return bool(triton.knobs.runtime.interpret)
