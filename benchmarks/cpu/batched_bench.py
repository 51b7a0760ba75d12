"""llama.cpp's own batched benchmark: its kernels without its server, and without the prompts' time.

It feeds random tokens, samples nothing and measures inside itself, so it is no contender but the ceiling of one: what its
decode steps alone would give.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence

from benchmarks.cpu.gguf_model import make_gguf
from benchmarks.cpu.rivals import Measurement, RivalFailed, Setting
from benchmarks.cpu.servers import llama_missing, llama_version
from benchmarks.cpu.shapes import make_model_folder
from minivllm.bench.workload import Item


class BatchedBench:
    """One process a run. Written by ``run``."""

    def __init__(self, setting: Setting, label: str, kind: str) -> None:
        self.setting = setting
        self.label = label
        self._kind = kind
        self._model = ""

    def missing(self) -> list[str]:
        """See ``Rival``."""
        return llama_missing(self.setting, ("llama-batched-bench", "llama-quantize", "llama-server"))

    def start(self) -> None:
        """See ``Rival``. Each run starts its own process, so there is no start time to tell."""
        setting = self.setting
        folder = make_model_folder(setting.shape, setting.models)
        self._model = str(make_gguf(setting.shape, folder, self._kind, str(setting.llama_program("llama-quantize"))))

    def warm_up(self, items: Sequence[Item]) -> None:
        """Nothing to do: every run is a new process, which warms up by itself."""

    def run(self, items: Sequence[Item]) -> Measurement:
        """See ``Rival``. Only the number and the lengths of the items count."""
        setting, count = self.setting, len(items)
        flags = {
            "-m": self._model,
            "-c": count * setting.context_len,
            "-npp": setting.prompt_len,
            "-ntg": setting.output_len,
            "-npl": count,
            "-t": setting.threads,
            "-tb": setting.threads,
            "--output-format": "jsonl",
        }
        command = [str(setting.llama_program("llama-batched-bench")), *(str(p) for pair in flags.items() for p in pair)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{") and '"t_tg"' in line]
        if ended.returncode != 0 or not found:
            raise RivalFailed(f"llama-batched-bench printed no result: {ended.stdout.strip()[-200:]}")
        return Measurement(found[-1]["pl"] * found[-1]["tg"], found[-1]["t_tg"])

    def peak_memory_bytes(self) -> None:
        """See ``Rival``. The process has ended by the time it could be asked."""

    def versions(self) -> Mapping[str, str]:
        """See ``Rival``."""
        return llama_version(self.setting)

    def stop(self) -> None:
        """Nothing is left running."""
