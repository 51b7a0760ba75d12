"""The contender's side of the pipe, for engines that are called as a library.

The parent writes one JSON line with the settings, then one a run; this process answers each with one line: ready with versions,
then the measurements. Whatever libraries print goes to standard error, so nothing gets between the answers.

    python -m benchmarks.cpu.worker ours | generate | continuous        (started by offline.py)
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

from benchmarks.cpu import worker_ours, worker_transformers
from benchmarks.cpu.rivals import Measurement
from minivllm import __version__

Generate = Callable[[Sequence[Sequence[int]], int], Measurement]  # prompts and the number of tokens to make for each
PROGRAMS: Final[Mapping[str, tuple[Callable[[Mapping[str, Any]], Generate], str]]] = {
    "ours": (worker_ours.load, "mini-vllm"),
    "generate": (worker_transformers.load_generate, "transformers"),
    "continuous": (worker_transformers.load_continuous, "transformers"),
}


def main() -> None:
    """Answer until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    load, package = PROGRAMS[sys.argv[1]]
    generate = load(json.loads(sys.stdin.readline()))
    told = __version__ if package == "mini-vllm" else version(package)  # ours may run from a checkout that is not installed
    print(json.dumps({"versions": {package: told, "torch": version("torch")}}), file=answers)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(asdict(generate(wanted["prompts"], wanted["max_tokens"]))), file=answers)


if __name__ == "__main__":
    main()
