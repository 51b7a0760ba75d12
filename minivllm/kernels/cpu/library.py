"""The compiled kernels as Python sees them: typed C functions, with torch's threads behind them.

The library leaves OpenMP's functions open, and here they are bound to the OpenMP library that torch has loaded. So there is one
pool of threads, its size is torch's (``torch.set_num_threads``), and the two never run against each other.
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
        "linear": "pppppplllliii=i",
        "lookup": "pppplllii=i",
        "panel_width": "=i",
        "prefer_huge_pages": "pl",
        "norm": "ppppppllllfii",
        "activation": "ppllliii",
        "rope": "ppppllllli",
        "attention": "pppppppllllf",
        "vector_width": "=i",
    }
)


class NativeLibrary:
    """The functions of ``native.cpp``, each an attribute that takes plain integers. Never changes once made."""

    def __init__(self, path: Path) -> None:
        """Load the library. Raises ``NoNativeKernels`` when it does not fit this process."""
        try:
            for openmp in _openmp_libraries():
                ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
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


def _openmp_libraries() -> list[str]:
    """The OpenMP library that torch brought into this process; where it cannot be found out, the system's by its usual name."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    loaded = {line.split(maxsplit=5)[5] for line in lines if "/" in line and "omp" in Path(line.split(maxsplit=5)[-1]).name}
    found = sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    beside_torch = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libomp*.dylib"))
    return found or beside_torch or ["libgomp.so.1"]
