"""The compiled kernels as Python sees them: typed C functions.

They have a pool of threads of their own, one for the process (``set_threads``); why not OpenMP's is told in ``native.cpp``. A
call releases the interpreter's lock while it computes.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from minivllm.kernels.cpu.build import NoNativeKernels

# How tensors' kinds are numbered in native.cpp.
KINDS: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})

_LETTERS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
# Function -> letters of its arguments: p pointer, l int64, i int32, f float. "=" and a letter: what it returns.
SIGNATURES: Mapping[str, str] = MappingProxyType(
    {
        "linear": "p=i",
        "lookup": "pppplllii=i",
        "set_threads": "i",
        "panel_width": "=i",
        "pack": "ppplli",
        "norm": "p",
        "activation": "p",
        "rope": "p",
        "attention": "p",
        "choose": "pppll",
        "vector_width": "=i",
        "item_rows": "=i",
    }
)


class NativeLibrary:
    """The functions of ``native.cpp``, each an attribute that takes plain integers. Never changes once made."""

    def __init__(self, path: Path) -> None:
        """Load the library. Raises ``NoNativeKernels`` when it does not fit this process."""
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoNativeKernels(f"they could not be loaded ({error})") from None
        for name, letters in SIGNATURES.items():
            arguments, _, result = letters.partition("=")
            function = getattr(library, name)
            function.argtypes = [_LETTERS[letter] for letter in arguments]
            function.restype = _LETTERS[result] if result else None
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        """Only for type checkers: every function is set when the library is loaded."""
        raise AttributeError(f"native.cpp has no function {name}")

