"""Figures: computed from known measurements, printed in the wording that users of vLLM's benchmarks know."""

import numpy as np
import pytest

from minivllm.bench.load import Outcome, Pace
from minivllm.bench.offline import latency, throughput
from minivllm.bench.report import ServingWanted, latency_text, serving_details, serving_result, serving_text, throughput_text
from minivllm.bench.workload import Item
from minivllm.types import SamplingParams


def outcome(start_s: float, ttft_s: float, gaps_s: list[float], num_input: int = 10) -> Outcome:
    times = [start_s + ttft_s + sum(gaps_s[:i]) for i in range(len(gaps_s) + 1)]
    return Outcome(
        start_s=start_s, ttft_s=ttft_s, latency_s=ttft_s + sum(gaps_s), itl_s=gaps_s, chunk_times_s=times,
        num_input=num_input, num_output=len(gaps_s) + 1, text="x",
    )  # fmt: skip


OUTCOMES = [
    outcome(0.0, 0.100, [0.010, 0.030]),
    outcome(0.5, 0.200, [0.020]),
    outcome(2.0, 0.300, []),
    Outcome(start_s=0.1, error="refused"),
]


def test_the_figures_of_known_measurements() -> None:
    wanted = ServingWanted(percentiles=(50.0, 99.0), goodput={"ttft": 250.0, "tpot": 21.0})
    result = serving_result(OUTCOMES, 4.0, wanted)
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 6)
    assert result["request_throughput"] == 0.75
    assert result["output_throughput"] == 1.5
    assert result["total_token_throughput"] == 9.0
    assert result["request_goodput"] == 0.5  # the third is over the limit of TTFT
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["median_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(np.std([100, 200, 300]))
    assert result["p99_ttft_ms"] == pytest.approx(298)
    assert result["mean_tpot_ms"] == pytest.approx(20)  # (40 / 2 + 20 / 1) / 2; an answer of one token has none
    assert result["mean_itl_ms"] == pytest.approx(20)
    assert result["p50_e2el_ms"] == pytest.approx(220)
    assert result["max_output_tokens_per_s"] == 5
    assert result["max_concurrent_requests"] == 1


def test_requests_that_overlap_are_counted_together() -> None:
    overlapping = [outcome(0.0, 1.0, [1.0]), outcome(0.5, 1.0, []), outcome(1.9, 1.0, [])]
    result = serving_result(overlapping, 3.0, ServingWanted())
    assert result["max_concurrent_requests"] == 2


def test_the_printed_report_has_the_known_labels() -> None:
    wanted = ServingWanted(metrics=("ttft", "tpot", "itl", "e2el"), goodput={"ttft": 250.0})
    text = serving_text(serving_result(OUTCOMES, 4.0, wanted), Pace(2.0, max_concurrency=8), wanted)
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    for label in (
        "Successful requests:", "Failed requests:", "Maximum request concurrency:", "Request rate configured (RPS):",
        "Benchmark duration (s):", "Total input tokens:", "Total generated tokens:", "Request throughput (req/s):",
        "Request goodput (req/s):", "Output token throughput (tok/s):", "Peak output token throughput (tok/s):",
        "Peak concurrent requests:", "Total token throughput (tok/s):", "Mean TTFT (ms):", "Median TTFT (ms):",
        "P99 TTFT (ms):",
        "Mean TPOT (ms):", "Mean ITL (ms):", "P99 E2EL (ms):",
    ):  # fmt: skip
        assert sum(line.startswith(label.ljust(40) + " ") for line in lines) == 1, label
    assert "Mean TTFT (ms):                          200.00    " in lines
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines


def test_optional_lines_are_left_out() -> None:
    text = serving_text(serving_result(OUTCOMES, 4.0, ServingWanted()), Pace(), ServingWanted())
    assert "concurrency:" not in text
    assert "rate configured" not in text
    assert "goodput" not in text
    assert "E2EL" not in text


def test_no_answer_at_all_is_still_a_report() -> None:
    result = serving_result([Outcome(error="refused")], 1.0, ServingWanted())
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 1, 0.0)
    serving_text(result, Pace(), ServingWanted())


def test_details_hold_every_request() -> None:
    details = serving_details(OUTCOMES)
    assert details["output_lens"] == [3, 2, 1, 0]
    assert details["errors"] == ["", "", "", "refused"]
    assert details["itls"][0] == [0.010, 0.030]


class FakeLLM:
    """Completes at once; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[object], list[SamplingParams]]] = []

    def generate(self, prompts: list[object], sampling: list[SamplingParams], progress: object = None) -> list[object]:
        self.calls.append((prompts, sampling))

        class Completion:
            prompt_ids = (1, 2)
            token_ids = (3, 4, 5)

        return [Completion() for _ in prompts]


def test_throughput_counts_prompts_and_outputs() -> None:
    llm = FakeLLM()
    result, num_prompt, num_output = throughput(llm, [Item((1, 2), 3), Item("text", 4)], {"temperature": 0.0})
    assert (num_prompt, num_output, result["total_num_tokens"], result["num_requests"]) == (4, 6, 10, 2)
    assert result["tokens_per_second"] == pytest.approx(10 / result["elapsed_time"])
    prompts, sampling = llm.calls[0]
    assert prompts == [[1, 2], "text"]
    assert [(s.max_tokens, s.ignore_eos, s.temperature) for s in sampling] == [(3, True, 0.0), (4, True, 0.0)]
    text = throughput_text({**result, "elapsed_time": 2.0, "requests_per_second": 1.0, "tokens_per_second": 5.0}, 4, 6)
    assert text.splitlines()[0] == "Throughput: 1.00 requests/s, 5.00 total tokens/s, 3.00 output tokens/s"


def test_latency_times_runs_after_the_warmup_with_fresh_prompts() -> None:
    llm = FakeLLM()
    result = latency(llm, lambda i: [Item((i,), 1)], {}, num_warmup=2, num_iters=3)
    assert len(result["latencies"]) == 3
    assert [prompts for prompts, _ in llm.calls] == [[[i]] for i in range(5)]
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert latency_text(result).startswith(f"Avg latency: {result['avg_latency']} seconds\n10% percentile latency: ")
