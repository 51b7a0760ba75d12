"""Metrics from hand-written records: every number has one meaning, in JSON and in the exposition format."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minivllm.config import make_config
from minivllm.observe.histogram import Histogram, one_two_five
from minivllm.observe.metrics import Metrics, metrics_for
from minivllm.records import FinishedTimes, PreemptionRecord, RowRecord, StepRecord
from minivllm.types import EngineInfo

LABELS = {"model_name": "fox", "engine": "0"}


class Clock:
    """Time as the test says."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(num_rows: int = 1, **values: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "step": 1, "scheduled_s": 0.0, "launched_s": 0.0, "finished_s": 0.0, "collected_s": 0.0,
        "rows": tuple(RowRecord(str(i), 0, 1, "decode") for i in range(num_rows)), "num_running": num_rows, "num_waiting": 0,
        "waits": (), "rest_waits": "", "blocks_total": 100, "blocks_free": 80, "blocks_cached": 5, "blocks_referenced": 15,
        "prefix_queries": 0, "prefix_hits": 0, "num_prompt_tokens": 0, "num_output_tokens": num_rows,
        "ttft_s": (), "itl_s": (), "finished": (),
    }  # fmt: skip
    return StepRecord(**{**fields, **values})


def gone(*names: str) -> tuple[PreemptionRecord, ...]:
    return tuple(PreemptionRecord(name, "blocks") for name in names)


def finished(**values: Any) -> FinishedTimes:
    fields: dict[str, Any] = {
        "id": "a", "reason": "stop", "num_prompt": 10, "num_cached": 0, "num_output": 5, "max_tokens": 16, "num_preemptions": 0,
        "arrival_s": 1.0, "scheduled_s": 2.0, "first_token_s": 4.0, "finished_s": 12.0,
    }  # fmt: skip
    return FinishedTimes(**{**fields, **values})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("fox", max_model_len=1024, cache_config={"block_size": 16}, clock=clock)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape by name and its labels beyond the common ones."""
    found = {}
    for family in text_string_to_metric_families(metrics.prometheus().decode()):
        for s in family.samples:
            own = tuple(sorted((k, v) for k, v in s.labels.items() if (k, v) not in LABELS.items()))
            found[s.name, own] = s.value
    return found


def test_json_before_anything_happened(metrics: Metrics) -> None:
    told = metrics.json()
    zero = ("active_requests", "waiting_requests", "current_batch_size", "total_tokens_generated", "tokens_per_second",
            "tokens_per_second_lifetime", "kv_cache_usage", "prefix_cache_hit_rate", "total_preemptions")  # fmt: skip
    assert {name: told[name] for name in zero} == dict.fromkeys(zero, 0)


def test_levels_are_the_last_and_counts_the_sum(metrics: Metrics) -> None:
    metrics.observe(record(3, num_waiting=7, prefix_queries=80, prefix_hits=20, num_prompt_tokens=60, preempted=gone("a")))
    metrics.observe(record(2, num_waiting=4, prefix_queries=20, prefix_hits=5, blocks_referenced=40))
    told = metrics.json()
    assert (told["active_requests"], told["waiting_requests"], told["current_batch_size"]) == (2, 4, 2)
    assert (told["total_tokens_generated"], told["total_prompt_tokens"], told["total_preemptions"]) == (5, 60, 1)
    assert (told["kv_cache_usage"], told["prefix_cache_hit_rate"]) == (0.4, 0.25)
    assert told["total_steps"] == 2


def test_an_idle_engine_has_no_batch(metrics: Metrics) -> None:
    metrics.observe(record(4, num_running=0))
    assert metrics.json()["current_batch_size"] == 0
    assert metrics.json()["total_tokens_generated"] == 4


def test_rates(metrics: Metrics, clock: Clock) -> None:
    """100 tokens a second for 20 s, then silence."""
    for _ in range(200):
        clock.now += 0.1
        metrics.observe(record(10))
    told = metrics.json()
    assert told["tokens_per_second"] == pytest.approx(100, rel=0.03)
    assert told["tokens_per_second_lifetime"] == pytest.approx(100, rel=0.01)
    clock.now += 5
    assert metrics.json()["tokens_per_second"] == pytest.approx(50, rel=0.06)
    clock.now += 5
    assert metrics.json()["tokens_per_second"] == pytest.approx(0, abs=3)
    clock.now += 10
    told = metrics.json()
    assert told["tokens_per_second"] == 0
    assert told["tokens_per_second_lifetime"] == pytest.approx(50, rel=0.01)


def test_a_young_server_is_not_averaged_over_ten_seconds(metrics: Metrics, clock: Clock) -> None:
    clock.now += 2
    metrics.observe(record(10))
    assert metrics.json()["tokens_per_second"] == 5


def test_memory_of_rates_is_bounded(metrics: Metrics, clock: Clock) -> None:
    for _ in range(5000):
        clock.now += 0.05
        metrics.observe(record(1))
    assert len(metrics._bins) <= 41


def test_histogram_bounds_belong_to_their_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    histogram.add_all([0.5, 1.0, 1.5, 2.0, 2.1])
    histogram.add(9.0)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("5.0", 5), ("+Inf", 6)]
    assert histogram.total == pytest.approx(16.1)


def test_one_two_five() -> None:
    assert one_two_five(1) == (1,)
    assert one_two_five(200) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert one_two_five(1024)[-3:] == (200, 500, 1000)


def test_exposition_has_the_names_that_dashboards_ask_for(metrics: Metrics) -> None:
    metrics.observe(
        record(2, num_waiting=3, num_prompt_tokens=30, prefix_queries=10, prefix_hits=4, preempted=gone("a", "b"),
               ttft_s=(0.03, 0.5), itl_s=(0.02,), finished=(finished(), finished(reason="length", num_output=1)))
    )  # fmt: skip
    got = samples(metrics)
    for name, value in {
        "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.15, "prefix_cache_queries_total": 10,
        "prefix_cache_hits_total": 4, "num_preemptions_total": 2, "prompt_tokens_total": 30, "generation_tokens_total": 2,
        "iteration_tokens_total_sum": 32, "time_to_first_token_seconds_count": 2, "time_to_first_token_seconds_sum": 0.53,
        "inter_token_latency_seconds_count": 1, "request_time_per_output_token_seconds_sum": 2.0,
        "request_time_per_output_token_seconds_count": 1, "e2e_request_latency_seconds_sum": 22,
        "request_queue_time_seconds_sum": 2,
        "request_inference_time_seconds_sum": 20, "request_prefill_time_seconds_sum": 4, "request_decode_time_seconds_sum": 16,
        "request_prompt_tokens_sum": 20, "request_generation_tokens_sum": 6, "request_params_max_tokens_count": 2,
    }.items():  # fmt: skip
        assert got["vllm:" + name, ()] == pytest.approx(value), name
    assert got["vllm:request_success_total", (("finished_reason", "stop"),)] == 1
    assert got["vllm:request_success_total", (("finished_reason", "abort"),)] == 0
    assert got["vllm:time_to_first_token_seconds_bucket", (("le", "0.02"),)] == 0
    assert got["vllm:time_to_first_token_seconds_bucket", (("le", "0.04"),)] == 1
    assert got["vllm:time_to_first_token_seconds_bucket", (("le", "+Inf"),)] == 2
    assert got["vllm:cache_config_info", (("block_size", "16"),)] == 1


def test_every_sample_names_its_engine(metrics: Metrics) -> None:
    for family in text_string_to_metric_families(metrics.prometheus().decode()):
        for sample in family.samples:
            assert sample.labels["engine"] == "0"
            assert family.name.endswith("cache_config_info") or sample.labels["model_name"] == "fox"


def test_requests_that_never_ran_have_no_times(metrics: Metrics) -> None:
    metrics.observe(record(0, finished=(finished(reason="abort", scheduled_s=None, first_token_s=None, num_output=0),)))
    got = samples(metrics)
    assert got["vllm:e2e_request_latency_seconds_count", ()] == 1
    assert got["vllm:request_queue_time_seconds_count", ()] == 0
    assert got["vllm:request_prefill_time_seconds_count", ()] == 0
    assert got["vllm:iteration_tokens_total_count", ()] == 0
    assert metrics.json()["total_requests"] == {"stop": 0, "length": 0, "abort": 1, "error": 0, "repetition": 0}


def test_prefix_and_two_engines_in_one_process() -> None:
    one, two = Metrics("a", "one:"), Metrics("b", "two:")
    one.observe(record(1))
    assert b"one:generation_tokens_total" in one.prometheus()
    assert b"one:" not in two.prometheus()


def test_labels_come_from_the_engine() -> None:
    info = EngineInfo(512, 8, 256, 16, 321, 400, (0,), "cpu", "bfloat16", 0, 0, 0)
    config = make_config(metrics_prefix="mine:", served_model_name=("fox",))
    text = metrics_for(config, info).prometheus().decode()
    assert 'mine:cache_config_info{block_size="16",cache_dtype="bfloat16"' in text
    assert 'num_gpu_blocks="321"' in text
    assert 'le="500.0"' in text
    assert 'le="1000.0",model_name="fox"} 0.0\nmine:request_prompt' not in text


def test_log_line(metrics: Metrics, clock: Clock) -> None:
    assert metrics.log_line()[1] is False
    clock.now += 10
    metrics.observe(record(5, num_waiting=2, num_prompt_tokens=100, prefix_queries=4, prefix_hits=1))
    line, busy = metrics.log_line()
    assert busy
    assert line == (
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 0.5 tokens/s, Running: 5 reqs, "
        "Waiting: 2 reqs, GPU KV cache usage: 15.0%, Prefix cache hit rate: 25.0%"
    )
    clock.now += 10
    metrics.observe(record(0, num_running=0))
    assert metrics.log_line()[1] is False
