"""mini-vLLM called as a library: one ``LLM``, one ``generate`` a run. Runs in the contender's own process."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.cpu.rivals import Measurement


def load(settings: Mapping[str, Any]) -> Callable[[Sequence[Sequence[int]], int], Measurement]:
    """Load the model. ``settings["options"]`` are those of ``LLM``."""
    from minivllm.llm import LLM
    from minivllm.types import SamplingParams

    llm = LLM(**settings["options"])

    def generate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Measurement:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        begin_s = time.perf_counter()
        done = llm.generate(prompts, sampling)
        elapsed_s = time.perf_counter() - begin_s
        return Measurement(sum(len(c.token_ids) for c in done), elapsed_s)

    return generate
