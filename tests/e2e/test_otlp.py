"""Spans of requests, as a collector over real HTTP receives them; and a server that needs no collector to serve."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from live_server import serve
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


class Collector:
    """What was sent to ``/v1/traces``. Written by its server's threads."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for group in sent.resource_spans:
                    collector.resources.append(values(group.resource.attributes))
                    collector.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Not now."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_a_request_is_a_span_with_a_span_for_each_phase(collector: Collector) -> None:
    with serve("--otlp-traces-endpoint", collector.url) as live:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        sampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        first = httpx.post(live.url + "/v1/completions", json={**BODY, "explain": True}, headers=sampled, timeout=60).json()
        two = httpx.post(live.url + "/v1/chat/completions", json={**chat, "n": 2}, timeout=60).json()
        assert httpx.post(live.url + "/v1/completions", json={"prompt": "x"} | {"n": 0}, timeout=60).status_code == 400
        unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
        assert httpx.post(live.url + "/v1/completions", json=BODY, headers=unsampled, timeout=60).status_code == 200
        broken = {"traceparent": "no such thing"}
        assert httpx.post(live.url + "/v1/completions", json=BODY, headers=broken, timeout=60).status_code == 200
        assert live.stop() == 0  # what is not sent yet is sent then
    assert {r["service.name"] for r in collector.resources} == {"mini-vllm"}
    by_id = {values(s.attributes)["gen_ai.response.id"]: s for s in collector.spans if s.name.endswith(" stories")}
    assert len(by_id) == 3 and {first["id"], two["id"]} < by_id.keys()

    root = by_id[first["id"]]
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("text_completion stories", TRACE_ID, PARENT_ID)
    found = values(root.attributes)
    wanted = {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "mini-vllm", "gen_ai.request.model": "stories",
        "gen_ai.response.model": "stories", "gen_ai.response.finish_reasons": ["length"], "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.input_tokens": first["usage"]["prompt_tokens"], "minivllm.steps": 5, "minivllm.preemptions": 0,
    }  # fmt: skip
    assert wanted.items() <= found.items()
    children = {s.name: s for s in collector.spans if s.parent_span_id == root.span_id}
    told = first["explain"]
    assert set(children) == {"received", "tokenize", "admit", "queue", "prefill", "decode", "deliver"}
    for phase in told["phases"][:-1]:
        child = children[phase["name"]]
        assert child.trace_id == root.trace_id
        assert child.start_time_unix_nano - root.start_time_unix_nano == pytest.approx(phase["began_s"] * 1e9, abs=2000)
        assert child.end_time_unix_nano - child.start_time_unix_nano == pytest.approx(
            (phase["ended_s"] - phase["began_s"]) * 1e9, abs=4000
        )
    assert root.start_time_unix_nano <= children["deliver"].end_time_unix_nano == root.end_time_unix_nano

    both = by_id[two["id"]]
    assert both.name == "chat stories" and not both.parent_span_id and both.trace_id.hex() != TRACE_ID
    assert values(both.attributes)["gen_ai.request.choice.count"] == 2
    texts = [s for s in collector.spans if s.parent_span_id == both.span_id and s.name.startswith("text ")]
    assert len(texts) == 2 and all(values(s.attributes)["gen_ai.usage.output_tokens"] <= 3 for s in texts)


def test_nobody_waits_for_a_collector_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        port = silent.getsockname()[1]
        with serve("--otlp-traces-endpoint", f"http://127.0.0.1:{port}/v1/traces") as live:
            for _ in range(5):
                assert httpx.post(live.url + "/v1/completions", json=BODY, timeout=60).status_code == 200
            assert live.stop() == 0
