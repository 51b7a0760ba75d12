"""From measurements to figures: the names, the wording and the JSON keys that users of vLLM's benchmarks know.

TTFT is the time to the first token, TPOT the mean time of an answer's later tokens, ITL the gap between two chunks of a
stream, E2EL the time to the end of the answer. All are printed in milliseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from minivllm.bench.load import Outcome, Pace

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(frozen=True)
class ServingWanted:
    """What of a serving benchmark is shown, and what counts as good. Limits are in milliseconds by metric."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] | None = None


def _values_ms(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Every measured value of the answers that came whole, by metric."""
    return {
        "ttft": [o.ttft_s * 1e3 for o in outcomes],
        "tpot": [t * 1e3 for o in outcomes if (t := o.tpot_s) is not None],
        "itl": [gap * 1e3 for o in outcomes for gap in o.itl_s],
        "e2el": [o.latency_s * 1e3 for o in outcomes],
    }


def _is_good(outcome: Outcome, limits_ms: Mapping[str, float]) -> bool:
    """True when an answer kept every limit."""
    met = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s or 0.0, "e2el": outcome.latency_s}
    return all(met[name] * 1e3 <= limit for name, limit in limits_ms.items())


def _peaks(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """The most chunks that arrived in one second, and the most requests that ran at one moment."""
    if not outcomes:
        return 0.0, 0
    begin = min(o.start_s for o in outcomes)
    arrived = np.array([t - begin for o in outcomes for t in o.chunk_times_s])
    moments = sorted([(o.start_s, 1) for o in outcomes] + [(o.start_s + o.latency_s, -1) for o in outcomes])
    running = np.cumsum([change for _, change in moments])
    return float(np.bincount(arrived.astype(np.int64)).max()), int(running.max())


def serving_result(outcomes: Sequence[Outcome], duration_s: float, wanted: ServingWanted) -> dict[str, Any]:
    """The figures of a serving benchmark, under the keys of vLLM's result files."""
    good = [o for o in outcomes if o.ok]
    total_in, total_out = sum(o.num_input for o in good), sum(o.num_output for o in good)
    peak_tokens, peak_requests = _peaks(good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration_s,
        "request_goodput": None,
        "output_throughput": total_out / duration_s,
        "total_token_throughput": (total_in + total_out) / duration_s,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }
    if wanted.goodput:
        result["request_goodput"] = sum(_is_good(o, wanted.goodput) for o in good) / duration_s
    for name, values in _values_ms(good).items():
        array = np.array(values or [0.0])
        result[f"mean_{name}_ms"] = float(array.mean())
        result[f"median_{name}_ms"] = float(np.median(array))
        result[f"std_{name}_ms"] = float(array.std())
        for p in wanted.percentiles:
            result[f"p{p:g}_{name}_ms"] = float(np.percentile(array, p))
    return result


def serving_details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every request's own values, for ``--save-detailed``. Times in seconds."""
    return {
        "input_lens": [o.num_input for o in outcomes],
        "output_lens": [o.num_output for o in outcomes],
        "ttfts": [o.ttft_s for o in outcomes],
        "itls": [o.itl_s for o in outcomes],
        "start_times": [o.start_s for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def _line(label: str, value: float | int) -> str:
    """One row of the report: 40 columns of label, 10 of value."""
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def serving_text(result: Mapping[str, Any], pace: Pace, wanted: ServingWanted) -> str:
    """The report of a serving benchmark."""
    rows = [f"{' Serving Benchmark Result ':=^50}"]
    rows += [_line("Successful requests:", result["completed"]), _line("Failed requests:", result["failed"])]
    if pace.max_concurrency is not None:
        rows.append(_line("Maximum request concurrency:", pace.max_concurrency))
    if np.isfinite(pace.request_rate):
        rows.append(_line("Request rate configured (RPS):", pace.request_rate))
    labels = (
        ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
    )
    rows += [_line(label, result[key]) for label, key in labels if result[key] is not None]
    for name in wanted.metrics:
        title, short = METRICS[name]
        rows.append(f"{title:-^50}")
        rows += [_line(f"{word.capitalize()} {short} (ms):", result[f"{word}_{name}_ms"]) for word in ("mean", "median")]
        rows += [_line(f"P{p:g} {short} (ms):", result[f"p{p:g}_{name}_ms"]) for p in wanted.percentiles]
    return "\n".join([*rows, "=" * 50])


def throughput_text(result: Mapping[str, Any], num_prompt_tokens: int, num_output_tokens: int) -> str:
    """The report of an offline throughput benchmark."""
    output_rate = num_output_tokens / result["elapsed_time"]
    return (
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s, "
        f"{output_rate:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {num_prompt_tokens}\n"
        f"Total num output tokens:  {num_output_tokens}"
    )


def latency_text(result: Mapping[str, Any]) -> str:
    """The report of a batch latency benchmark."""
    rows = [f"Avg latency: {result['avg_latency']} seconds"]
    rows += [f"{p}% percentile latency: {seconds} seconds" for p, seconds in result["percentiles"].items()]
    return "\n".join(rows)
