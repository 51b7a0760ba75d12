"""Contenders that are called as a library, each in a worker process (``worker.py``)."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu.rivals import (
    Measurement,
    OwnsProgram,
    Setting,
    check_complete,
    is_importable,
    ours_missing,
    ours_options,
    python_command,
)
from benchmarks.cpu.shapes import make_model_folder
from minivllm.bench.workload import Item


class Worker(OwnsProgram):
    """A library behind the worker's pipe. Written by its own methods."""

    def __init__(self, setting: Setting, label: str, program: str, settings: Mapping[str, Any]) -> None:
        super().__init__(setting, label)
        self._name = program
        self._settings = settings
        self._versions: Mapping[str, str] = {}

    def missing(self) -> list[str]:
        """See ``Rival``."""
        return []

    def start(self) -> float:
        """See ``Rival``."""
        make_model_folder(self.setting.shape, self.setting.models)
        begin_s = time.perf_counter()
        self.launch(python_command("benchmarks.cpu.worker", self._name), answers=True)
        self._versions = self._ask(self._settings)["versions"]
        return time.perf_counter() - begin_s

    def run(self, items: Sequence[Item]) -> Measurement:
        """See ``Rival``."""
        found = self._ask({"prompts": [item.prompt for item in items], "max_tokens": items[0].max_tokens})
        measured = Measurement(
            found["output_tokens"], found["duration_s"], tuple(found["ttft_s"]), tuple(found["itl_s"])
        )
        check_complete(items, measured.output_tokens)
        return measured

    def versions(self) -> Mapping[str, str]:
        """See ``Rival``."""
        return self._versions

    def _ask(self, question: Mapping[str, Any]) -> Any:
        """Write a line to the process and read its answer. Raises ``RivalFailed`` when it ended instead."""
        process = self.program.process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.wait()
            raise self.program.failure()
        return json.loads(answer)


class Ours(Worker):
    """mini-vLLM's ``LLM``. It cannot say when a single request got its first token: that is measured over HTTP."""

    def __init__(self, setting: Setting, label: str, options: Mapping[str, Any]) -> None:
        super().__init__(setting, label, "ours", {"options": ours_options(setting, options)})
        self._options = options

    def missing(self) -> list[str]:
        """See ``Rival``."""
        return ours_missing(self._options)


class Transformers(Worker):
    """transformers, as "generate" or "continuous" (batching)."""

    def __init__(self, setting: Setting, label: str, program: str, dtype: str) -> None:
        settings = {
            "folder": str(setting.models / setting.shape.name),
            "dtype": dtype,
            "threads": setting.threads,
            "max_concurrency": setting.max_concurrency,
            "context_len": setting.context_len,
        }
        super().__init__(setting, label, program, settings)

    def missing(self) -> list[str]:
        """See ``Rival``."""
        if not is_importable("transformers"):
            return ["transformers is not installed; pip install transformers"]
        if not self.setting.shape.has_checkpoint:
            return [f"no checkpoint of {self.setting.shape.name} is made; measure it with --shape gpt2"]
        if self._name == "continuous" and not is_importable("transformers.generation.continuous_batching"):
            return ["this transformers has no continuous batching; pip install --upgrade transformers"]
        return []
