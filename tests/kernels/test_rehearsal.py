"""Helpers compile what a rehearsal notes into Triton's cache, without a GPU: only the loading at the end needs one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import os, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from minivllm.kernels.triton import rehearsal
from minivllm.kernels.triton.chip import Chip
from minivllm.kernels.triton.elementwise import Elementwise

class Driver(rehearsal._NoDevice):
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
compiled = []
triton.knobs.compilation.listener = lambda *, cache_hit, **told: compiled.append(cache_hit)
rehearsal._load = lambda kernel: None
os.sched_getaffinity = lambda process: range(4)

def play(launch):
    ops, nowhere = Elementwise(Chip("of a test", 132, True, 200_000, launch)), torch.device("meta")
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device=nowhere) for shape in ((4, 256), (256,)))
    for _ in range(2):
        ops.rms_norm(x, weight, 1e-6)
        ops.add_rms_norm(x, x, weight, 1e-6)
        ops.gated_activation(x, "silu")

helpers = rehearsal.fork_helpers()
assert helpers is not None
count = rehearsal.compile_all(play, "a test", helpers)
print(count, all(compiled), len(compiled))
"""


def test_helpers_fill_the_cache(tmp_path: Path, repo: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "True", "3"]  # three kernels, and this process found all of them in the cache
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("rehearsed-")]) == 1
