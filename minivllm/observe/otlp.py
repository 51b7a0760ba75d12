"""Spans of requests for OpenTelemetry: one for each request, below it one for each phase, sent to a collector over HTTP.

Attributes have the names of OpenTelemetry's conventions for generative AI where these have one, and ``minivllm.`` before the
others. A client's ``traceparent`` is the parent of its request's span, and decides whether it is sampled.

Nothing waits for the collector: spans go into a bounded queue, a thread sends them in batches, and what does not fit is
dropped. The libraries are optional, and imported when somebody asks for spans.
"""

import time
from typing import TYPE_CHECKING, Final

from minivllm import __version__
from minivllm.errors import InvalidOption
from minivllm.observe.explanation import Explanation, Phase
from minivllm.observe.trail import Trail

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SEND_TIMEOUT_S: Final = 5.0  # for one batch; then it is lost
_SCHEMES: Final = ("http://", "https://")
Value = str | int | float | bool | list[str]


class SpanExporter:
    """Makes spans of explanations. Written by the event loop that answers requests."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("minivllm", __version__)
        self._zero_ns = time.time_ns() - time.monotonic_ns()  # what makes a stamp of ours a time of day

    def tell(self, explanation: Explanation, trail: Trail) -> None:
        """A request is over."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        operation = "chat" if explanation.id.startswith("chatcmpl-") else "text_completion"
        zero_ns = self._zero_ns + round(trail.received_s * 1e9)

        def at(seconds: float) -> int:
            return zero_ns + round(seconds * 1e9)

        root = self._tracer.start_span(
            f"{operation} {explanation.model}",
            context=_parent(trail.traceparent),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, **_attributes(explanation)},
            start_time=zero_ns,
        )
        below = set_span_in_context(root)
        for preemption in explanation.preemptions:
            found: dict[str, Value] = {"minivllm.reason": preemption.reason, "minivllm.lost_tokens": preemption.lost_tokens}
            if preemption.by is not None:
                found["minivllm.by"] = preemption.by
            root.add_event("preempted", found, at(preemption.at_s))
        if explanation.finish_reason == "error":
            root.set_status(Status(StatusCode.ERROR))

        def phases(told: tuple[Phase, ...], context: "Context") -> None:
            for phase in told:
                span = self._tracer.start_span(phase.name, context=context, start_time=at(phase.began_s))
                span.end(at(phase.ended_s))

        phases(explanation.phases, below)
        for number, text in enumerate(explanation.sequences):
            span = self._tracer.start_span(f"text {number}", context=below, attributes=_attributes(text), start_time=zero_ns)
            phases(text.phases, set_span_in_context(span))
            span.end(at(text.total_s))
        root.end(at(explanation.total_s))

    def close(self) -> None:
        """Send what there is. Waits for the collector, so it is to be called beside the event loop."""
        self._provider.shutdown()


def _parent(traceparent: str) -> "Context":
    """The client's own span; a header that makes no sense is as none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _attributes(told: Explanation) -> dict[str, Value]:
    found: dict[str, Value] = {
        "gen_ai.provider.name": "mini-vllm",
        "gen_ai.request.model": told.model,
        "gen_ai.response.model": told.model,
        "gen_ai.response.id": told.id,
        "gen_ai.response.finish_reasons": sorted({t.finish_reason or "abort" for t in (told.sequences or (told,))}),
        "gen_ai.usage.input_tokens": told.prompt_tokens,
        "gen_ai.usage.output_tokens": told.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": told.cached_tokens,
        "minivllm.steps": told.steps,
        "minivllm.shared_with.mean": told.shared_with.mean,
        "minivllm.chunks": len(told.chunks),
        "minivllm.preemptions": len(told.preemptions),
        "minivllm.unexplained_s": told.unexplained_s,
    }
    if told.sequences:
        found["gen_ai.request.choice.count"] = len(told.sequences)
    if told.first_text_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = told.first_text_s
    for wait in told.waits:  # one code may have several sentences
        key = f"minivllm.waited_s.{wait.reason.replace(' ', '_')}"
        before = found.get(key, 0.0)
        found[key] = wait.seconds + (before if isinstance(before, float) else 0.0)
    return found


def span_exporter(endpoint: str) -> SpanExporter:
    """What sends spans to ``endpoint``. Raises ``InvalidOption`` for one that is no address, and without the libraries."""
    if not endpoint.startswith(_SCHEMES):
        raise InvalidOption(
            f"--otlp-traces-endpoint must be a collector's address for traces over HTTP, such as "
            f"http://127.0.0.1:4318/v1/traces, got {endpoint!r}."
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as missing:
        raise InvalidOption(
            "--otlp-traces-endpoint needs OpenTelemetry's libraries; install them with `pip install 'mini-vllm[otlp]'`."
        ) from missing
    resource = Resource.create({"service.name": "mini-vllm", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # ``close`` does that
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=SEND_TIMEOUT_S)))
    return SpanExporter(provider)
