"""What a contender of the benchmark is, and the processes behind one.

Every contender runs in processes of its own and is the only one alive while it is measured: started, measured at every size,
stopped, then the next one's turn; and so on for every round. Loaded but idle contenders would hold memory that the others' page
cache wants, and some thread pools spin for a while after work. Starting anew each round also gives each round's start time, and
a peak of memory that belongs to this contender alone. The price is a few seconds a round.

The clock is in the contender's process where it is called as a library, and in the client where it is a server.
"""

import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.cpu.machine import peak_memory_bytes
from benchmarks.cpu.shapes import Shape
from minivllm.bench.workload import Item

REPOSITORY = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 20.0


class RivalFailed(Exception):
    """A contender ended, refused, or did not do the work asked for."""


@dataclass(frozen=True)
class Setting:
    """What all contenders are told."""

    shape: Shape
    models: Path  # folder that holds model folders and GGUF files
    logs: Path  # folder for what contenders print
    llama_cpp: Path | None  # folder of llama.cpp's programs; none: those on PATH
    threads: int
    max_concurrency: int
    prompt_len: int
    output_len: int
    quiet_wait_s: float = 0.0  # longest wait before a measurement for others to leave the machine alone

    @property
    def context_len(self) -> int:
        """Tokens of one finished sequence."""
        return self.prompt_len + self.output_len

    def llama_program(self, name: str) -> str | None:
        """Path of one of llama.cpp's programs."""
        return shutil.which(name, path=None if self.llama_cpp is None else str(self.llama_cpp))


@dataclass(frozen=True)
class Measurement:
    """One run of N requests. Times per request or per gap, where the contender can say them; else empty."""

    output_tokens: int
    duration_s: float  # from the first request sent to the last token of all
    ttft_s: tuple[float, ...] = ()
    itl_s: tuple[float, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.duration_s


class Rival(Protocol):
    """One contender. A new one is a class with these and a line in ``contenders.py``."""

    label: str  # in the table

    def missing(self) -> list[str]:
        """Why it cannot run here, each reason with its remedy; empty means it can."""

    def start(self) -> float | None:
        """Make its model files if need be, start it, and return the seconds from the process's start until it is ready."""

    def warm_up(self, items: Sequence[Item]) -> None:
        """Do a short piece of work of the size that is measured next: libraries make things on first use."""

    def run(self, items: Sequence[Item]) -> Measurement:
        """Run all items at once, greedily and to their full length. Raises ``RivalFailed``."""

    def peak_memory_bytes(self) -> int | None:
        """The most memory its processes held since the start; None where nobody can say."""

    def versions(self) -> Mapping[str, str]:
        """What ran, by name."""

    def stop(self) -> None:
        """End its processes."""


def check_complete(items: Sequence[Item], output_tokens: int) -> None:
    """Raise ``RivalFailed`` unless every item got all its tokens: a rate of work that was not done is no rate."""
    wanted = sum(item.max_tokens for item in items)
    if output_tokens != wanted:
        raise RivalFailed(f"it made {output_tokens} of {wanted} tokens")


@dataclass
class Program:
    """A contender's process. Written by the contender that owns it."""

    command: Sequence[str]
    log: Path
    threads: int
    answers: bool  # it talks over its standard streams; else what it prints goes to the log, so that no pipe can fill
    process: subprocess.Popen[str] = field(init=False)
    _log_file: IO[str] = field(init=False)

    def __post_init__(self) -> None:
        """Start it."""
        self._log_file = self.log.open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE if self.answers else subprocess.DEVNULL,
            stdout=subprocess.PIPE if self.answers else self._log_file,
            stderr=self._log_file,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"},
        )

    def failure(self) -> RivalFailed:
        """What its log says, when it ended before its time."""
        tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return RivalFailed(f"its process ended ({self.log}: {tail[0] if tail else 'empty'})")

    @property
    def peak_memory_bytes(self) -> int:
        """See ``Rival``."""
        return peak_memory_bytes(self.process.pid)

    def stop(self) -> None:
        """Ask it to end, and end it if it does not."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log_file.close()


def python_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


class OwnsProgram(ABC):
    """What contenders with one long-lived process share. Written by its own start and stop."""

    def __init__(self, setting: Setting, label: str) -> None:
        self.setting = setting
        self.label = label
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        """The running process."""
        if self._program is None:
            raise RuntimeError(f"{self.label} was not started")
        return self._program

    def launch(self, command: Sequence[str], answers: bool) -> Program:
        """Start the process; its log is named after the label."""
        name = "".join(c if c.isalnum() else "-" for c in self.label)
        self._program = Program(command, self.setting.logs / f"{name}.log", self.setting.threads, answers)
        return self._program

    @abstractmethod
    def run(self, items: Sequence[Item]) -> Measurement:
        """See ``Rival``."""

    def warm_up(self, items: Sequence[Item]) -> None:
        """See ``Rival``."""
        self.run(items)

    def peak_memory_bytes(self) -> int:
        """See ``Rival``."""
        return self.program.peak_memory_bytes

    def stop(self) -> None:
        """See ``Rival``."""
        if self._program is not None:
            self._program.stop()
        self._program = None


def is_importable(module: str) -> bool:
    """True when a module can be found, without importing it."""
    from importlib.util import find_spec

    return find_spec(module) is not None


def ours_options(setting: Setting, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """mini-vLLM's options for a setting: room for exactly the largest size, as llama.cpp gets it."""
    block_size = 16
    blocks_each = -(-setting.context_len // block_size) + 1  # one more: newcomers leave a block free for every row
    return {
        "model": str(setting.models / setting.shape.name),
        "load_format": "auto" if setting.shape.has_checkpoint else "dummy",
        "num_threads": setting.threads,
        "max_model_len": setting.context_len,
        "max_num_seqs": setting.max_concurrency,
        "block_size": block_size,
        "num_gpu_blocks_override": setting.max_concurrency * blocks_each + 1,
        **chosen,
    }


def ours_missing(chosen: Mapping[str, Any]) -> list[str]:
    """Reasons for which this mini-vLLM does not know the chosen options."""
    from minivllm.config import make_config
    from minivllm.errors import InvalidOption

    try:
        make_config(**chosen)
    except InvalidOption as error:
        return [str(error)]
    return []
