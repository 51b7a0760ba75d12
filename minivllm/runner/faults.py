"""What a failure in a step means: for one request, for the size of steps, or for the process.

A fault of the device is not the step's that happens to meet it. Memory that is not there makes steps smaller. An error that the
device repeats at every call (an illegal access, a failed assertion) is the end of this process: nothing that it does on the
device can be trusted or even called any more. (What is done for one row alone is told from the rest in ``rows.fault_of``.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minivllm.errors import DeviceLost, OutOfDeviceMemory

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
)  # as torch, its CPU allocator and Triton say it


@contextmanager
def faults_of(device: torch.device) -> Iterator[None]:
    """Around all that may call the device. Raises ``DeviceLost`` and ``OutOfDeviceMemory`` for what is no request's fault."""
    try:
        yield
    except Exception as error:
        if device.type == "cuda" and (lost := _lost(device)) is not None:
            raise DeviceLost(f"The device {device} cannot be used by this process any more: {lost}") from error
        if not is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfDeviceMemory(str(error)) from error


def _lost(device: torch.device) -> str | None:
    """What the device answers to a call that does nothing, if it is an error: one that does not go away is told at any call."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return str(error).partition("\n")[0]
    return None


def is_out_of_memory(error: Exception) -> bool:
    """True where there was no memory for a call."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
