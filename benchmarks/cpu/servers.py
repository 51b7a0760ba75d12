"""Contenders that are HTTP servers: started on a free port, asked by N streaming clients at once (``minivllm.bench.load``).

The client is this process and shares the machine's cores with the server, as a client on the same machine does. Both kinds of
server meet the same client, so what it costs is the same for both.
"""

import asyncio
import socket
import subprocess
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from benchmarks.cpu.gguf_model import make_gguf
from benchmarks.cpu.rivals import (
    Measurement,
    OwnsProgram,
    RivalFailed,
    Setting,
    check_complete,
    is_importable,
    ours_missing,
    ours_options,
    python_command,
)
from benchmarks.cpu.shapes import make_model_folder
from minivllm import __version__
from minivllm.bench.load import Pace, Target, run_load
from minivllm.bench.workload import Item

POLL_S: Final = 0.02
INSTALL_LLAMA: Final = "build llama.cpp (benchmarks/README.md says how) and name the folder of its programs with --llama-cpp"


def llama_missing(setting: Setting, programs: Sequence[str]) -> list[str]:
    """Reasons for which llama.cpp cannot be measured."""
    absent = [p for p in programs if setting.llama_program(p) is None]
    reasons = [f"{' and '.join(absent)} not found; {INSTALL_LLAMA}"] if absent else []
    if not is_importable("gguf"):
        reasons.append("its model file cannot be written; pip install gguf")
    if not setting.shape.has_checkpoint:
        reasons.append(f"no checkpoint of {setting.shape.name} is made; measure it with --shape gpt2")
    return reasons


def llama_version(setting: Setting) -> Mapping[str, str]:
    """What llama.cpp's server says of itself."""
    printed = subprocess.run([str(setting.llama_program("llama-server")), "--version"], capture_output=True, text=True)
    lines = (printed.stdout + printed.stderr).strip().splitlines()
    return {"llama.cpp": next((line.removeprefix("version: ") for line in lines if line.startswith("version")), "unknown")}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class HttpServer(OwnsProgram):
    """A server with ``/health`` and OpenAI's ``/v1/completions``. Written by its own methods."""

    def __init__(self, setting: Setting, label: str) -> None:
        super().__init__(setting, label)
        self._url = ""

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """The command that starts it; what it needs on disk is made first."""

    @abstractmethod
    def body(self) -> Mapping[str, Any]:
        """Fields of each request beside prompt and length: greedy, to the full length."""

    def start(self) -> float:
        """See ``Rival``."""
        port = free_port()
        command = self.command(port)
        self._url = f"http://127.0.0.1:{port}"
        begin_s = time.perf_counter()
        program = self.launch(command, answers=False)
        while not self._is_ready():
            if program.process.poll() is not None:
                raise program.failure()
            time.sleep(POLL_S)
        return time.perf_counter() - begin_s

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + "/health", timeout=1.0) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def run(self, items: Sequence[Item]) -> Measurement:
        """See ``Rival``."""
        target = Target(self._url + "/v1/completions", "bench", extra=self.body())
        outcomes, duration_s = asyncio.run(run_load(target, items, Pace()))
        if wrong := next((o.error for o in outcomes if not o.ok), None):
            raise RivalFailed(wrong)
        num_output = sum(o.num_output for o in outcomes)
        check_complete(items, num_output)
        gaps = tuple(gap for o in outcomes for gap in o.itl_s)
        return Measurement(num_output, duration_s, tuple(o.ttft_s for o in outcomes), gaps)


class OursOverHttp(HttpServer):
    """``mini-vllm serve``: two processes."""

    def __init__(self, setting: Setting, label: str, options: Mapping[str, Any]) -> None:
        super().__init__(setting, label)
        self._options = options

    def missing(self) -> list[str]:
        """See ``Rival``."""
        return ours_missing(self._options)

    def command(self, port: int) -> list[str]:
        """See ``HttpServer``."""
        make_model_folder(self.setting.shape, self.setting.models)
        options = {**ours_options(self.setting, self._options), "port": port, "served_model_name": "bench"}
        flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
        return python_command("minivllm", "serve", *flags)

    def body(self) -> Mapping[str, Any]:
        """See ``HttpServer``."""
        return {"temperature": 0.0, "ignore_eos": True}

    def versions(self) -> Mapping[str, str]:
        """See ``Rival``."""
        return {"mini-vllm": __version__, "torch": version("torch")}


class LlamaServer(HttpServer):
    """llama.cpp's server with as many slots as the largest size asks for.

    Set in its favour: the shortest sampler chain that is greedy, and no copies of old prompts in memory (none comes twice).
    """

    def __init__(self, setting: Setting, label: str, kind: str) -> None:
        super().__init__(setting, label)
        self._kind = kind

    def missing(self) -> list[str]:
        """See ``Rival``."""
        return llama_missing(self.setting, ("llama-server", "llama-quantize"))

    def command(self, port: int) -> list[str]:
        """See ``HttpServer``."""
        setting = self.setting
        folder = make_model_folder(setting.shape, setting.models)
        model = make_gguf(setting.shape, folder, self._kind, str(setting.llama_program("llama-quantize")))
        flags = {
            "--model": model,
            "--port": port,
            "--parallel": setting.max_concurrency,
            "--ctx-size": setting.max_concurrency * setting.context_len,
            "--threads": setting.threads,
            "--threads-batch": setting.threads,
            "--cache-ram": 0,
        }
        return [str(setting.llama_program("llama-server")), *(str(part) for pair in flags.items() for part in pair)]

    def body(self) -> Mapping[str, Any]:
        """See ``HttpServer``."""
        return {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True, "cache_prompt": False}

    def versions(self) -> Mapping[str, str]:
        """See ``Rival``."""
        return llama_version(self.setting)
