"""transformers, in its two ways to run a batch. Runs in the contender's own process.

``generate`` takes a static batch: all prompts have the same length here, so it pads nothing and wastes nothing. Continuous
batching has a background thread, a paged cache and a scheduler; its cache is sized for the largest batch, because its own
sizing asks a GPU for its memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.cpu.rivals import Measurement, RivalFailed

PAGE_SIZE = 256  # tokens; its default
MAX_BATCH_TOKENS = 2048  # as mini-vLLM's and llama.cpp's default


def _load_model(settings: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=getattr(torch, settings["dtype"])).eval()
    model.generation_config.eos_token_id = None  # answers have the full length
    model.generation_config.pad_token_id = 0
    return model


class _StepTimes:
    """What ``generate`` calls a streamer: told of the prompt first, then of every step. Written by ``generate``."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, tokens: Any) -> None:
        """A step's tokens are there."""
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """The last step is over."""


def load_generate(settings: Mapping[str, Any]) -> Callable[[Sequence[Sequence[int]], int], Measurement]:
    """``model.generate`` on a static batch."""
    import torch

    model = _load_model(settings)

    def generate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Measurement:
        ids = torch.tensor(prompts)  # [requests, prompt]
        steps = _StepTimes()
        begin_s = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, streamer=steps
            )
        elapsed_s = time.perf_counter() - begin_s
        times = steps.at_s[1:]  # the first call only repeats the prompt
        gaps = [later - earlier for earlier, later in pairwise(times)]
        num_new = out.shape[0] * (out.shape[1] - ids.shape[1])
        return Measurement(num_new, elapsed_s, (times[0] - begin_s,) * len(prompts), tuple(gaps) * len(prompts))

    return generate


def load_continuous(settings: Mapping[str, Any]) -> Callable[[Sequence[Sequence[int]], int], Measurement]:
    """The continuous batching manager, kept running between runs as a server would."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _load_model(settings)
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=settings["max_concurrency"] * -(-settings["context_len"] // PAGE_SIZE) + 1,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=settings["max_concurrency"],
    )
    manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), config)
    manager.start()

    def generate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Measurement:
        begin_s = time.perf_counter()
        names = manager.add_requests([list(p) for p in prompts], max_new_tokens=max_tokens, record_timestamps=True)
        waiting, outputs = set(names), []
        while waiting:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RivalFailed("its background thread ended")
            elif output.is_finished():
                if output.error is not None:
                    raise RivalFailed(output.error)
                waiting.discard(output.request_id)
                outputs.append(output)
        elapsed_s = time.perf_counter() - begin_s
        times = [o.timestamps for o in outputs]
        gaps = [later - earlier for t in times for earlier, later in pairwise(t)]
        num_new = sum(len(o.generated_tokens) for o in outputs)
        return Measurement(num_new, elapsed_s, tuple(t[0] - begin_s for t in times), tuple(gaps))

    return generate
