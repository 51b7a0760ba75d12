"""Where a step's time goes, against the floor that the machine sets.

    python benchmarks/cpu/profile.py [--rows 1,8,32] [--prompt-len 128] [--steps 30] [--threads 2] [options of LLM]
    python benchmarks/cpu/profile.py --model FOLDER --load-format dummy --dtype bfloat16 --quantization int8

Every op of the table that the layers call, the attention backend, sampler and scheduler are wrapped with a clock; an inner
one's time is taken out of the outer's. What is left is Python: the modules, making tensors, the rows, the loop. The clocks
themselves cost about 1 µs a call and are part of the Python.

The floor of a step is the larger of its bytes (weights, keys, values) over the measured read bandwidth and its operations over
the measured peak of the same kernels on one large product. A table, then a line of JSON.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import minivllm.runner.build as runner_build
from minivllm import LLM, SamplingParams
from minivllm.types import GenerateRequest

PARTS = ("matmuls", "attention", "elementwise", "sampling", "scheduler", "Python")
ELEMENTWISE = (
    "lookup", "embedding", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "activation", "gated_activation"
)  # fmt: skip


class Clock:
    """Time by part. Written by the calls it wraps."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time added to ``part`` without that of wrapped calls inside."""

        def timed(*args: Any, **named: Any) -> Any:
            self._inner_s.append(0.0)
            began = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                elapsed = time.perf_counter() - began
                self.spent_s[part] += elapsed - self._inner_s.pop()
                self._inner_s[-1] += elapsed

        return timed


def clocked_llm(clock: Clock, options: dict[str, Any]) -> LLM:
    """An ``LLM`` whose parts report to ``clock``."""
    choose, select = runner_build.choose_ops, runner_build.select_backend

    def clocked_ops(*args: Any) -> Any:
        ops, reasons = choose(*args)
        parts = dict.fromkeys(ELEMENTWISE, "elementwise") | {"linear": "matmuls", "logits": "matmuls"}
        return replace(ops, **{name: clock.wrap(part, getattr(ops, name)) for name, part in parts.items()}), reasons

    def clocked_backend(*args: Any) -> Any:
        backend, reasons = select(*args)
        backend.run = clock.wrap("attention", backend.run)  # type: ignore[method-assign]
        return backend, reasons

    runner_build.choose_ops, runner_build.select_backend = clocked_ops, clocked_backend
    try:
        llm = LLM(**options)
    finally:
        runner_build.choose_ops, runner_build.select_backend = choose, select
    engine: Any = llm.engine
    engine._scheduler.schedule = clock.wrap("scheduler", engine._scheduler.schedule)
    engine._scheduler.apply = clock.wrap("scheduler", engine._scheduler.apply)
    sampler = engine._executor.runner.sampler
    sampler.sample = clock.wrap("sampling", sampler.sample)
    engine.step = clock.wrap("Python", engine.step)
    return llm


def measure(llm: LLM, clock: Clock, num_rows: int, prompt_len: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds by part of one prefill step of ``num_rows`` prompts and of the mean decode step after it."""
    generator = torch.Generator().manual_seed(num_rows)
    for i in range(num_rows):
        ids = torch.randint(5, llm.info.vocab_size, (prompt_len,), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 2, ignore_eos=True, seed=0)
        llm.engine.add(GenerateRequest(id=f"{num_rows}-{i}", prompt_ids=tuple(ids), sampling=sampling, arrival_s=0.0))
    found = {}
    clock.spent_s.clear()
    while not (output := llm.engine.step()) or len(output.events) < num_rows:
        pass
    found["prefill"] = {part: clock.spent_s[part] * 1e3 for part in PARTS}
    llm.engine.step()
    clock.spent_s.clear()
    for _ in range(num_steps):
        llm.engine.step()
    found["decode"] = {part: clock.spent_s[part] * 1e3 / num_steps for part in PARTS}
    while llm.engine.has_work:
        llm.engine.step()
    return found


def best_s(call: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def machine(llm: LLM) -> tuple[float, float]:
    """Read bandwidth in bytes/s, and multiplications and additions per second of the model's kernels on a large product."""
    numbers = torch.ones(2**27)  # 512 MiB: far above any cache
    bandwidth = numbers.nbytes / best_s(lambda: numbers.sum())
    decoder: Any = llm.engine._executor.runner.decoder  # type: ignore[attr-defined]
    layer = decoder.layers[0].mlp.down
    x = torch.randn(1024, layer.matrix.num_in).to(layer.setup.dtype)
    operations = 2 * 1024 * layer.matrix.num_in * layer.matrix.num_out
    return bandwidth, operations / best_s(lambda: layer.setup.ops.linear(x, layer.matrix, None))


def floors_ms(llm: LLM, num_rows: int, prompt_len: int, bandwidth: float, peak: float) -> dict[str, float]:
    """The least time of each kind of step."""
    decoder: Any = llm.engine._executor.runner.decoder  # type: ignore[attr-defined]
    body = [m.matrix for m in decoder.layers.modules() if hasattr(m, "matrix")]
    head = (decoder.head_table or decoder.embedding).matrix
    weights = sum(m.num_out * m.num_in for m in body)
    head_weights = head.num_out * head.num_in
    kv_token_bytes = llm.info.kv_bytes / (llm.info.num_blocks * llm.info.block_size)
    read = sum(m.nbytes for m in body) + head.nbytes + num_rows * prompt_len * kv_token_bytes
    return {
        "prefill": 1e3 * 2 * num_rows * (weights * prompt_len + head_weights) / peak,
        "decode": 1e3 * max(read / bandwidth, 2 * num_rows * (weights + head_weights) / peak),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    known, rest = parser.parse_known_args()
    options: dict[str, Any] = {"num_threads": known.threads, "enable_prefix_caching": False, "max_num_batched_tokens": 8192}
    options |= {name.removeprefix("--").replace("-", "_"): value for name, value in zip(rest[::2], rest[1::2], strict=True)}
    clock = Clock()
    llm = clocked_llm(clock, options)
    bandwidth, peak = machine(llm)
    print(f"read {bandwidth / 1e9:.1f} GB/s, product {peak / 1e9:.0f} G operations/s, {llm.info.dtype}")
    print(f"{'step, ms':<16}" + "".join(f"{part:>12}" for part in (*PARTS, "total", "floor")))
    results = []
    measure(llm, clock, 2, 16, 3)
    for num_rows in map(int, known.rows.split(",")):
        found = measure(llm, clock, num_rows, known.prompt_len, known.steps)
        floors = floors_ms(llm, num_rows, known.prompt_len, bandwidth, peak)
        for kind, parts in found.items():
            times = (*parts.values(), sum(parts.values()), floors[kind])
            print(f"{kind + ' x ' + str(num_rows):<16}" + "".join(f"{t:12.3f}" for t in times), flush=True)
            results.append({"step": kind, "rows": num_rows, "floor_ms": floors[kind], "parts_ms": parts})
    facts = {"threads": torch.get_num_threads(), "bytes_per_s": bandwidth, "operations_per_s": peak}
    print(json.dumps({"benchmark": "cpu-profile", "dtype": llm.info.dtype, **facts, "steps": results}))


if __name__ == "__main__":
    main()
