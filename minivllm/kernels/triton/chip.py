"""The chip that kernels are launched on, and how a kernel may begin before the one in front of it has ended.

A decode step is a chain of some two hundred kernels of a few microseconds. Between two of them a GPU waits: the last blocks
of the first drain, the results are flushed, the blocks of the second are set up. Programmatic dependent launch (compute
capability 9 and later, https://docs.nvidia.com/cuda/cuda-c-programming-guide/, "Programmatic Dependent Launch and
Synchronization") lets the second be set up meanwhile: it starts when every block of the first has said so or ended
(``let_next_start``), may read what no kernel of the step writes (weights), and waits for the first's results where it needs
them (``wait_for_previous``).

The rule that keeps it right: every kernel launched so calls ``wait_for_previous`` in every program, before its first read of
activations and its first write of anything. Then a kernel's end means that all before it have ended too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

Launch = Callable[..., None]  # (kernel, grid, *arguments, **constants and options)


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch ``kernel``; it is compiled first, if it never was for such arguments."""
    kernel[grid](*arguments, **options)


@dataclass(frozen=True)
class Chip:
    """What launches depend on. Decided once at start."""

    name: str  # as in the table of choices; "interpreter" where kernels run as Python on a CPU
    num_sms: int  # streaming multiprocessors
    early_launch: bool  # programmatic dependent launch can be had
    shared_bytes: int  # shared memory that a program may have
    # How every kernel of ours is launched, or else only compiled (``rehearsal.py``).
    launch: Launch = field(default=launch_now, repr=False)

    @property
    def launch_options(self) -> dict[str, Any]:
        """Options for ``kernel[grid](..., **options)`` of a kernel that keeps the rule above."""
        return {"launch_pdl": True} if self.early_launch else {}


def this_chip(device: torch.device) -> Chip:
    """The chip of ``device``; for the CPU, Triton's interpreter."""
    if device.type != "cuda":
        return Chip("interpreter", 4, early_launch=False, shared_bytes=2**18)
    found: Any = torch.cuda.get_device_properties(device)
    return Chip(
        found.name, found.multi_processor_count, early_launch=found.major >= 9, shared_bytes=found.shared_memory_per_block_optin
    )


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """From here on, results of the kernels before may be read. ``EARLY``: the launch was an early one."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel's programs may be set up from now on, as far as this one is concerned."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
