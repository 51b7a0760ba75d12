"""The Prometheus face of Metrics: the names, labels and buckets that existing dashboards of this field ask for.

Nothing is counted here. At a scrape the collector reads the numbers of ``Metrics`` and lays them out as metric families,
in a registry of its own (the client library's default one is a global that would mix two engines of one process).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from minivllm.observe.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENGINE = "0"  # the label of the only engine

HISTOGRAM_HELP = {
    "iteration_tokens_total": "Tokens computed or generated in a step.",
    "time_to_first_token_seconds": "Time from arrival to the first token.",
    "inter_token_latency_seconds": "Time between two tokens of a request.",
    "request_time_per_output_token_seconds": "Mean time per token of a request, the first left out.",
    "e2e_request_latency_seconds": "Time from arrival to the end of a request.",
    "request_queue_time_seconds": "Time a request waited before it ran first.",
    "request_inference_time_seconds": "Time from running first to the end.",
    "request_prefill_time_seconds": "Time from running first to the first token.",
    "request_decode_time_seconds": "Time from the first token to the end.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens generated for a request.",
    "request_params_max_tokens": "The max_tokens of a request.",
}


class Exposition:
    """Read-only view of ``Metrics`` in the exposition formats; ``collect`` is called by the registry at each scrape."""

    def __init__(self, metrics: "Metrics", prefix: str, cache_config: Mapping[str, object]) -> None:
        self._metrics = metrics
        self._prefix = prefix
        self._cache_config = {name: str(value) for name, value in cache_config.items()}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """Every number in the text format. Scrapers that ask for a newer format take this one too; in that one the client
        library would turn the colon of the names into an underscore."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family, from the numbers as they stand."""
        m, last = self._metrics, self._metrics.last
        yield self._gauge("num_requests_running", "Requests in the running batch.", last.num_running if last else 0)
        yield self._gauge("num_requests_waiting", "Requests that wait to run.", last.num_waiting if last else 0)
        yield self._gauge("num_requests_paused", "Requests whose client does not read.", last.num_paused if last else 0)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", m.kv_cache_usage)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", m.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", m.prefix_hits)
        yield self._counter("num_preemptions", "Requests that gave way because blocks ran out.", m.preemptions)
        yield self._counter("engine_restarts", "Engines that took the place of one that died.", m.engine_restarts)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", m.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", m.generation_tokens)
        yield self._counters("request_success", "Requests that ended, by reason.", "finished_reason", m.finished)
        text = "Requests and connections that were not taken in, by reason."
        yield self._counters("admission_rejections", text, "reason", m.rejections)
        for name, histogram in m.histograms.items():
            family = HistogramMetricFamily(self._prefix + name, HISTOGRAM_HELP[name], labels=["model_name", "engine"])
            family.add_metric([m.model_name, ENGINE], histogram.cumulative(), histogram.total)
            yield family
        if self._cache_config:
            labels = {"engine": ENGINE, **self._cache_config}
            info = GaugeMetricFamily(
                self._prefix + "cache_config_info", "What the KV cache was set to.", labels=list(labels)
            )
            info.add_metric(list(labels.values()), 1)
            yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=["model_name", "engine"])
        family.add_metric([self._metrics.model_name, ENGINE], value)
        return family

    def _counters(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=["model_name", "engine", label])
        for value, count in counts.items():
            family.add_metric([self._metrics.model_name, ENGINE, value], count)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=["model_name", "engine"])
        family.add_metric([self._metrics.model_name, ENGINE], value)
        return family
