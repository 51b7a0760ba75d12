"""Metrics: what the engine did, counted from StepRecords and from nothing else; and who was refused before it came there.

``observe`` runs once a step inside the event loop that serves HTTP, so it only adds numbers; names, labels and formats are
made when somebody asks (``json``, ``prometheus``, ``log_line``). A record holds differences (tokens of *this* step) and
levels (requests running *after* it); counters here are sums of the former, gauges the last of the latter. It does not know
the engine, the clock of the machine (a test passes its own) or HTTP.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from minivllm.config import Config
from minivllm.observe.histogram import REQUEST_TIME_S, STEP_TOKENS, TOKEN_TIME_S, TTFT_S, Histogram, one_two_five
from minivllm.observe.prometheus import Exposition
from minivllm.records import FinishedTimes, StepRecord
from minivllm.types import EngineInfo

WINDOW_S = 10.0  # tokens_per_second looks back this far
BIN_S = 0.25  # and remembers tokens in bins of this width


class Metrics:
    """Written by whoever reads the engine's outputs (``AsyncLLM.run``), one ``observe`` a record; read in the same thread.

    ``cache_config`` are the labels of ``cache_config_info``; ``max_model_len`` bounds the token histograms.
    """

    def __init__(
        self,
        model_name: str,
        prefix: str = "vllm:",
        *,
        max_model_len: int = 2**17,
        cache_config: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_name = model_name
        self._clock = clock
        self._started_s = clock()
        self._bins: deque[list[float]] = deque()  # [bin number, tokens], oldest first, at most WINDOW_S / BIN_S + 1
        self.last: StepRecord | None = None
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.engine_restarts = 0  # engines that took a dead one's place; no record tells of it, so ``AsyncLLM`` does
        self.rejections: Counter[str] = Counter()  # requests and connections that were not taken in, by reason
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0})
        lengths = one_two_five(max_model_len)
        self.histograms: dict[str, Histogram] = {
            "iteration_tokens_total": Histogram(STEP_TOKENS),
            "time_to_first_token_seconds": Histogram(TTFT_S),
            "inter_token_latency_seconds": Histogram(TOKEN_TIME_S),
            "request_time_per_output_token_seconds": Histogram(TOKEN_TIME_S),
            "e2e_request_latency_seconds": Histogram(REQUEST_TIME_S),
            "request_queue_time_seconds": Histogram(REQUEST_TIME_S),
            "request_inference_time_seconds": Histogram(REQUEST_TIME_S),
            "request_prefill_time_seconds": Histogram(REQUEST_TIME_S),
            "request_decode_time_seconds": Histogram(REQUEST_TIME_S),
            "request_prompt_tokens": Histogram(lengths),
            "request_generation_tokens": Histogram(lengths),
            "request_params_max_tokens": Histogram(lengths),
        }
        self._step_tokens = self.histograms["iteration_tokens_total"]
        self._ttft = self.histograms["time_to_first_token_seconds"]
        self._itl = self.histograms["inter_token_latency_seconds"]
        self._exposition = Exposition(self, prefix, cache_config or {})
        self._logged = (self._started_s, 0, 0)  # when, prompt tokens, output tokens at the last log line

    def observe(self, record: StepRecord) -> None:
        """Count one step."""
        self.last = record
        self.steps += 1
        self.prompt_tokens += record.num_prompt_tokens
        self.generation_tokens += record.num_output_tokens
        self.prefix_queries += record.prefix_queries
        self.prefix_hits += record.prefix_hits
        self.preemptions += len(record.preempted)
        if record.rows:
            self._step_tokens.add(record.num_prompt_tokens + record.num_output_tokens)
        if record.ttft_s:
            self._ttft.add_all(record.ttft_s)
        if record.itl_s:
            self._itl.add_all(record.itl_s)
        if record.num_output_tokens:
            self._remember(record.num_output_tokens)
        for request in record.finished:
            self._finish(request)

    def reject(self, reason: str) -> None:
        """Count a request that is not served for want of room."""
        self.rejections[reason] += 1

    def _remember(self, tokens: int) -> None:
        """Put tokens into the bin of now, and forget bins that are older than the window."""
        number = self._clock() // BIN_S
        bins = self._bins
        if bins and bins[-1][0] == number:
            bins[-1][1] += tokens
        else:
            bins.append([number, tokens])
            while bins[0][0] <= number - WINDOW_S / BIN_S:
                bins.popleft()

    def _finish(self, r: FinishedTimes) -> None:
        """Count one request that has ended."""
        self.finished[r.reason] += 1
        put = self.histograms
        put["request_prompt_tokens"].add(r.num_prompt)
        put["request_generation_tokens"].add(r.num_output)
        put["request_params_max_tokens"].add(r.max_tokens)
        put["e2e_request_latency_seconds"].add(r.finished_s - r.arrival_s)
        if r.scheduled_s is None:
            return
        put["request_queue_time_seconds"].add(r.scheduled_s - r.arrival_s)
        put["request_inference_time_seconds"].add(r.finished_s - r.scheduled_s)
        if r.first_token_s is None:
            return
        put["request_prefill_time_seconds"].add(r.first_token_s - r.scheduled_s)
        put["request_decode_time_seconds"].add(r.finished_s - r.first_token_s)
        if r.num_output > 1:
            put["request_time_per_output_token_seconds"].add((r.finished_s - r.first_token_s) / (r.num_output - 1))

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks that requests hold now, 0 to 1; cached blocks that nobody holds are free for the taking."""
        last = self.last
        return last.blocks_referenced / last.blocks_total if last is not None and last.blocks_total else 0.0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Of all prompt tokens looked up in the prefix cache so far, the share that was found, 0 to 1."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second over the last ten seconds (over the server's life while that is shorter)."""
        now = self._clock()
        tokens = sum(count for number, count in self._bins if number > now // BIN_S - WINDOW_S / BIN_S)
        return tokens / max(BIN_S, min(WINDOW_S, now - self._started_s))

    def json(self) -> dict[str, Any]:
        """The plain answer of ``GET /metrics``: a flat object for eyes and small scripts."""
        last, uptime_s = self.last, self._clock() - self._started_s
        running = last.num_running if last is not None else 0
        return {
            "model": self.model_name,
            "active_requests": running,
            "waiting_requests": last.num_waiting if last is not None else 0,
            "paused_requests": last.num_paused if last is not None else 0,
            "current_batch_size": len(last.rows) if last is not None and running else 0,
            "total_tokens_generated": self.generation_tokens,
            "total_prompt_tokens": self.prompt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "tokens_per_second_lifetime": round(self.generation_tokens / max(BIN_S, uptime_s), 2),
            "kv_cache_usage": round(self.kv_cache_usage, 4),
            "prefix_cache_hit_rate": round(self.prefix_cache_hit_rate, 4),
            "total_requests": dict(self.finished),
            "total_rejections": dict(self.rejections),
            "total_preemptions": self.preemptions,
            "total_steps": self.steps,
            "engine_restarts": self.engine_restarts,
            "uptime_s": round(uptime_s, 1),
        }

    def prometheus(self) -> bytes:
        """The answer to a scrape, in ``prometheus.CONTENT_TYPE``."""
        return self._exposition.render()

    def log_line(self) -> tuple[str, bool]:
        """What happened since the last call, in the words that log parsers of this field know, and whether anything did."""
        now = self._clock()
        then, prompt, output = self._logged
        self._logged = (now, self.prompt_tokens, self.generation_tokens)
        span_s = max(1e-9, now - then)
        running, waiting = (self.last.num_running, self.last.num_waiting) if self.last is not None else (0, 0)
        busy = bool(running or waiting or self.generation_tokens > output or self.prompt_tokens > prompt)
        return (
            f"Engine 000: Avg prompt throughput: {(self.prompt_tokens - prompt) / span_s:.1f} tokens/s, "
            f"Avg generation throughput: {(self.generation_tokens - output) / span_s:.1f} tokens/s, "
            f"Running: {running} reqs, Waiting: {waiting} reqs, GPU KV cache usage: {100 * self.kv_cache_usage:.1f}%, "
            f"Prefix cache hit rate: {100 * self.prefix_cache_hit_rate:.1f}%"
        ), busy


def metrics_for(config: Config, info: EngineInfo) -> Metrics:
    """The metrics of one engine, labelled with what it settled on."""
    return Metrics(
        config.served_names[0],
        config.server.metrics_prefix,
        max_model_len=info.max_model_len,
        cache_config={
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_blocks,
            "cache_dtype": info.dtype,
            "enable_prefix_caching": config.cache.enable_prefix_caching,
            "gpu_memory_utilization": config.cache.gpu_memory_utilization,
            "kv_cache_memory_bytes": config.cache.kv_cache_memory_bytes,
            "num_gpu_blocks_override": config.cache.num_gpu_blocks_override,
        },
    )
