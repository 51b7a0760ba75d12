"""/generate, /metrics and the probes: what a plain curl sees."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_engine import STORY, Live

from minivllm.server.sse import text_event


def sse_client(body: str) -> list[tuple[str, str]]:
    """Events as the standard says to read them: (type, data)."""
    found, kind, data = [], "message", []
    for line in body.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if not line:
            if data:
                found.append((kind, "\n".join(data)))
            kind, data = "message", []
        elif line.startswith("event:"):
            kind = line[6:].removeprefix(" ")
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    return found


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" fox", "data:  fox\n\n"),
        ("a\nb", "data: a\ndata: b\n\n"),
        ("a\r\nb\rc", "data: a\ndata: b\ndata: c\n\n"),
        ("\n", "data: \ndata: \n\n"),
        ("a\u2028b\x0bc\x85", "data: a\u2028b\x0bc\x85\n\n"),  # line breaks elsewhere, not in this standard
    ],
)
def test_text_event(text: str, written: str) -> None:
    assert text_event(text).decode() == written


def test_generate_streams_a_token_an_event(start: Callable[..., Live]) -> None:
    live = start(delay_s=0.02)
    reply = httpx.post(f"{live.url}/generate", json={"prompt": "Tell me", "max_tokens": 8})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    script = live.tokenizer.encode(STORY)[:8]
    assert [text for _, text in sse_client(reply.text)] == [live.tokenizer.decode([t]) for t in script]
    assert reply.text == "".join(f"data: {live.tokenizer.decode([t])}\n\n" for t in script)


def test_generate_is_greedy_and_bounded_by_default(http: httpx.Client, live: Live) -> None:
    http.post("/generate", json={"prompt": "Tell me"})
    sampling = live.client.added[0].sampling
    assert sampling.greedy
    assert sampling.max_tokens == 128


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
def test_line_breaks_arrive_as_lf(start: Callable[..., Live], delay_s: float) -> None:
    """One byte a token, so that with a delay the CR and LF of a CRLF, and the bytes of a letter, come in different steps."""
    live = start(delay_s=delay_s)
    live.client.text = "a\r\n\r\n\nb\r\rc\nü\r"
    live.client.ends = True
    reply = httpx.post(f"{live.url}/generate", json={"prompt": "x", "max_tokens": 99})
    assert all(text for _, text in sse_client(reply.text))  # nothing to say, no event
    assert "".join(text for _, text in sse_client(reply.text)) == live.client.text.replace("\r\n", "\n").replace("\r", "\n")


def test_failure_is_an_event_of_its_own_type(http: httpx.Client, live: Live) -> None:
    live.client.failing = True
    found = sse_client(http.post("/generate", json={"prompt": "x"}).text)
    assert [kind for kind, _ in found][-1] == "error"
    assert {kind for kind, _ in found[:-1]} == {"message"}
    assert json.loads(found[-1][1])["error"]["message"] == "The scripted engine was told to fail."


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json", None])
def test_json_whatever_the_content_type(http: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    reply = http.post("/generate", content=b'{"prompt": "x", "max_tokens": 2}', headers=headers)
    assert reply.status_code == 200


def test_plain_curl(start: Callable[..., Live]) -> None:
    live = start(delay_s=0.02)
    words = ["curl", "-sS", f"{live.url}/generate", "-d", '{"prompt": "Tell me", "max_tokens": 3}', "--no-buffer"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    assert done.stdout.count("data: ") == 3


def test_foreign_origin_is_refused(http: httpx.Client, live: Live) -> None:
    own, port = live.url, live.port
    for origin, allowed in (
        (own, True),
        ("https://evil.example", False),
        ("http://evil.example", False),
        (f"http://127.0.0.1:{port + 1}", False),
        ("null", False),
        ("http://[", False),
        ("", False),
    ):
        reply = http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers={"origin": origin})
        assert reply.status_code == (200 if allowed else 403), origin
    rebound = {"origin": f"http://evil.example:{port}", "host": f"evil.example:{port}"}
    assert http.post("/generate", json={"prompt": "x"}, headers=rebound).status_code == 403
    local = {"origin": f"http://localhost:{port}", "host": f"localhost:{port}"}
    assert http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=local).status_code == 200


def test_metrics_follow_the_accept_header(http: httpx.Client, live: Live) -> None:
    before = http.get("/metrics").json()["total_tokens_generated"]
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 7})
    plain = http.get("/metrics")
    assert plain.headers["content-type"] == "application/json"
    assert plain.json()["total_tokens_generated"] == before + 7
    wanted = {
        "active_requests", "waiting_requests", "current_batch_size", "total_tokens_generated", "tokens_per_second",
        "tokens_per_second_lifetime", "kv_cache_usage", "prefix_cache_hit_rate",
    }  # fmt: skip
    assert wanted <= set(plain.json())
    prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    for path, accept, kind in (
        ("/metrics", "text/plain", "text/plain"),
        ("/metrics", prometheus, "text/plain"),
        ("/metrics/prometheus", "*/*", "text/plain"),
    ):
        reply = http.get(path, headers={"accept": accept})
        assert reply.headers["content-type"].startswith(kind)
        assert 'vllm:generation_tokens_total{engine="0",model_name="fox"}' in reply.text


def test_probes(http: httpx.Client) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        reply = http.request(method, path)
        assert (reply.status_code, reply.content) == (200, b"")
    assert set(http.get("/version").json()) == {"version"}


def test_openapi_describes_bodies(http: httpx.Client) -> None:
    document: dict[str, Any] = http.get("/openapi.json").json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
    assert {"prompt", "temperature", "stream"} <= set(fields)


def test_openapi_tells_the_replies_there_are(http: httpx.Client) -> None:
    paths: dict[str, Any] = http.get("/openapi.json").json()["paths"]
    told = {
        path: {code: list(reply.get("content", ())) for code, reply in operation["responses"].items()}
        for path, operations in paths.items()
        for operation in operations.values()
    }
    assert {tuple(codes) for codes in told.values()} == {("200", "default")}, "a refusal has one form, and it is not FastAPI's"
    for path, content in (("/live", []), ("/health", []), ("/metrics/prometheus", ["text/plain"])):
        assert told[path]["200"] == content
        assert http.get(path).headers.get("content-type", "").split(";")[0] == "".join(content)
    assert told["/generate"]["200"] == ["text/event-stream"]
    assert told["/v1/completions"]["200"] == ["application/json", "text/event-stream"]
    assert told["/tokenize"]["200"] == ["application/json"]
