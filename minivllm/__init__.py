"""mini-vLLM: an LLM inference engine and server that is small enough to read.

Start at docs/architecture.md, then ``types.py`` (what passes between the parts), ``scheduler/scheduler.py`` (who runs) and
``runner/runner.py`` (how it runs). Importing this package imports nothing heavy: the names below load on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "minivllm.llm",
    "AsyncLLM": "minivllm.async_llm",
    "BeamSearchParams": "minivllm.beams",
    "SamplingParams": "minivllm.types",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``mini-vllm --help`` does not pay for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minivllm' has no attribute {name!r}")
