"""How much memory goes to what, settled once before anything is loaded.

Three things take memory: weights, the KV cache, and the workspace of the largest step. Weights follow from the model, the
workspace from the options; the cache gets the rest of the share that it may use, or exactly what an option says. If the
context that was asked for does not fit, that is an error with figures; if none was asked for, the context becomes what fits.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from minivllm.config import Config
from minivllm.errors import InvalidOption, NotEnoughMemory
from minivllm.models.spec import ModelSpec
from minivllm.runner.kv_cache import KVShape
from minivllm.runner.logprobs import LEAST_SLICE

CPU_SHARE = 0.4  # of the memory that is free: a server shares its machine
GPU_SHARE = 0.9  # of the device's memory
CPU_CACHE_LIMIT_BYTES = 4 * 2**30  # unless an option asks for more
FEW_SHAPES_BYTES = 48 * 2**20  # what oneDNN compiles for the shapes of 16-bit products (kernels/few_shapes.py); measured
GIB = 2**30


@dataclass(frozen=True)
class FixedMemory:
    """What does not depend on how the rest is divided."""

    weights_bytes: int
    dtype: torch.dtype  # of activations
    kernels_bytes: int  # compiled by libraries while they run


@dataclass(frozen=True)
class Sizes:
    """What was settled."""

    max_model_len: int  # tokens
    num_blocks: int  # scratch block 0 included
    kv_bytes: int
    workspace_bytes: int
    notes: tuple[str, ...]


def settle(config: Config, spec: ModelSpec, shape: KVShape, fixed: FixedMemory, device: torch.device) -> Sizes:
    """Divide the memory; raises ``NotEnoughMemory`` or ``InvalidOption``."""
    asked = config.model.max_model_len
    if asked is not None and asked > spec.max_positions:
        raise InvalidOption(f"--max-model-len is {asked}, but this model's positions end at {spec.max_positions}; lower it.")
    length = asked or spec.max_positions
    workspace = workspace_bytes(config, spec, fixed.dtype, length) + fixed.kernels_bytes
    block_bytes = shape.block_bytes(spec.num_layers)
    num_blocks, available = _num_blocks(config, length, block_bytes, fixed.weights_bytes + workspace, device)
    fits = (num_blocks - 1) * shape.block_size  # tokens of one sequence that has the cache to itself
    notes: list[str] = []
    if fits < (asked or 1):
        needed = (-(-length // shape.block_size) + 1) * block_bytes
        raise NotEnoughMemory(
            f"A sequence of {length} tokens needs {needed / GIB:.3g} GiB of KV cache, but {available / GIB:.3g} GiB are "
            f"available, which hold {max(fits, 0)} tokens; lower --max-model-len, or raise --kv-cache-memory-bytes or "
            "--gpu-memory-utilization."
        )
    if fits < length:
        notes.append(f"The context is capped at {fits} of the model's {length} tokens, which is what the KV cache holds.")
        length = fits
    return Sizes(length, num_blocks, num_blocks * block_bytes, workspace, tuple(notes))


@dataclass(frozen=True)
class Measured:
    """What a run of the largest step took."""

    workspace_bytes: int
    graphs_bytes: int  # set aside for captured steps


def resettle(config: Config, sizes: Sizes, block_bytes: int, measured: Measured, device: torch.device) -> Sizes:
    """Size the cache again, now that weights are loaded and the workspace was measured. Raises ``NotEnoughMemory``."""
    workspace = measured.workspace_bytes + measured.graphs_bytes
    num_blocks, _ = _num_blocks(config, sizes.max_model_len, block_bytes, workspace, device)
    fits = (num_blocks - 1) * config.cache.block_size
    notes = sizes.notes
    if fits < sizes.max_model_len:
        notes += (f"The context is capped at {fits} tokens, which is what the KV cache holds.",)
    return Sizes(min(fits, sizes.max_model_len), num_blocks, num_blocks * block_bytes, workspace, notes)


def _num_blocks(config: Config, length: int, block_bytes: int, other_bytes: int, device: torch.device) -> tuple[int, int]:
    """Return the number of blocks and the bytes that were there for them; raises ``NotEnoughMemory``."""
    cache = config.cache
    free, total = memory_bytes(device)
    if cache.num_gpu_blocks_override is not None or cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.num_gpu_blocks_override or (cache.kv_cache_memory_bytes or 0) // block_bytes
        _check_fits(other_bytes + num_blocks * block_bytes, free, "weights, workspace and the KV cache that was asked for")
        return num_blocks, num_blocks * block_bytes
    if device.type == "cpu":
        budget = int((cache.gpu_memory_utilization or CPU_SHARE) * free)
    else:
        budget = int((cache.gpu_memory_utilization or GPU_SHARE) * total) - (total - free)
    _check_fits(other_bytes + 2 * block_bytes, budget, "weights, workspace and the least KV cache")
    available = budget - other_bytes
    if device.type == "cpu" and cache.gpu_memory_utilization is None:
        available = min(available, CPU_CACHE_LIMIT_BYTES)
    usable = config.scheduler.max_num_seqs * -(-length // cache.block_size) + 1  # more blocks than this could never be in use
    return min(available // block_bytes, usable), available


def _check_fits(needed: int, available: int, what: str) -> None:
    """Raise ``NotEnoughMemory`` when ``needed`` bytes are more than are available."""
    if needed > available:
        raise NotEnoughMemory(
            f"{what.capitalize()} need {needed / GIB:.3g} GiB, but {available / GIB:.3g} GiB are available; free memory, raise "
            "--gpu-memory-utilization, lower --max-model-len or --max-num-batched-tokens, or take a smaller model or --dtype."
        )


def workspace_bytes(config: Config, spec: ModelSpec, dtype: torch.dtype, length: int) -> int:
    """Estimate what the largest step needs beside weights and cache, tables that live as long as the runner included."""
    tokens, seqs, size = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs, dtype.itemsize
    tokens = min(tokens, seqs * length)
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    stream = tokens * spec.hidden_size * (3 * size + 12)  # block output, residual, normed, and a norm's float32 steps
    qkv = tokens * (heads + 2 * kv_heads) * (2 * size + 8) + tokens * heads * 3 * size  # projected, turned (in float32); output
    context = 2 * length * kv_heads * (4 if config.runner.batch_invariant else size) + 256 * length * 5  # gathered K, V; mask
    mlp = tokens * spec.intermediate_size * 4 * size
    body = stream + max(qkv + context, mlp)
    rows = min(max(seqs, LEAST_SLICE), tokens)  # sampled, or a slice of a prompt whose logprobs are wanted
    logits = rows * spec.vocab_size * 4 * 3  # float32, and a sampler's sorted copy with its indices
    rope = length * spec.rope.rotary_dim * 4 if spec.rope else 0  # cos and sin of every position
    tables = seqs * (length + 1) * 4 + seqs * -(-length // config.cache.block_size) * 4
    return max(body, logits) + rope + tables


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory of the device; for the CPU, within the limits of the container that this process is in."""
    if device.type != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo("MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def _meminfo(field: str) -> int | None:
    """A field of /proc/meminfo in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _number(path: Path) -> int | None:
    """A number that is a file's whole text; None where there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
