"""From ``native.cpp`` to a library for this very CPU, compiled once and kept.

The compiler is the machine's own, told to use everything that the CPU has; that takes some seconds, at installation
(``python -m minivllm.kernels.cpu.build``, which make runs) or else at the first start. The file's name is a digest of source,
flags, compiler and CPU, so another CPU, compiler or version of the source is another file, and a library in use is never
written to. Without a compiler nothing is lost but speed: the torch versions of the same kernels serve.

A library is code that will run, so it is only kept where nobody else can write: a folder of the user's own, mode 0700.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "native.cpp"
COMPILERS = ("g++", "clang++", "c++")
# No option changes what a program means but these two: square roots need not set errno, and comparisons may be done for lanes
# whose result is not used.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
COMPILE_TIMEOUT_S = 120.0


class NoNativeKernels(Exception):
    """Why there is no library; one sentence."""


def find_or_build() -> Path:
    """The library of this source for this machine, compiled now if it is not there. Raises ``NoNativeKernels``."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NoNativeKernels(f"no C++ compiler was found ({', '.join(COMPILERS)})")
    flags = (*FLAGS, _native_flag())
    digest = hashlib.sha256("\0".join((SOURCE.read_text(), *flags, _run(compiler, "--version"), _cpu())).encode()).hexdigest()
    folder = _folder()
    library = folder / f"native-{digest[:24]}.so"
    if not library.exists():
        _compile(compiler, flags, library)
    return library


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile beside the final place and move there at once, so that two starts at a time cannot see half a file."""
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as place:
            linked = Path(place) / "native.so"
            _run(compiler, *flags, "-shared", str(SOURCE), "-o", str(linked))
            linked.replace(library)
    except OSError as error:
        raise NoNativeKernels(f"they could not be written ({error})") from None


def _run(*command: str) -> str:
    """Run a compiler and return what it says; raises ``NoNativeKernels`` with its first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise NoNativeKernels(f"{command[0]} took more than {COMPILE_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise NoNativeKernels(f"{command[0]} does not run ({error})") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NoNativeKernels(f"{command[0]} failed ({next((x for x in lines if 'error' in x), lines[-1])})")
    return done.stdout


def _folder() -> Path:
    """Where libraries are kept; made if need be. Raises ``NoNativeKernels`` for a place that others can write to."""
    try:
        folder = Path.home() / ".cache" / "mini-vllm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise NoNativeKernels(f"there is no folder to keep them in ({error})") from None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NoNativeKernels(f"{folder} can be written by others; make it your own with mode 0700")
    return folder


def _native_flag() -> str:
    """How a compiler is told to use all of this CPU."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"


def _cpu() -> str:
    """What the compiler would see of the CPU: its model and features; the machine's name where the system has no such list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def main() -> int:
    """Compile now, as an installation step; having no compiler is not a failure."""
    try:
        print(f"CPU kernels: {find_or_build()}")
    except NoNativeKernels as reason:
        print(f"CPU kernels are not compiled: {reason}. The torch versions will serve, more slowly.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
