# ruff: noqa: E501  (tables of texts)
"""What published attacks on engines of this kind sent, sent to this one, on every route that has the field or a sibling of it.

Fixes of such faults were often incomplete: a sibling route, grammar or loader was forgotten. So each test ranges over all of them. The
table in docs/reliability.md says which test is for which advisory; test_table.py holds the two together.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer

NATIVE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
GENERATING = (NATIVE, COMPLETIONS, CHAT)
OPENAI = (COMPLETIONS, CHAT)
GOOD: dict[str, dict[str, Any]] = {
    NATIVE: {"prompt": "Once upon a time", "max_tokens": 4},
    COMPLETIONS: {"prompt": "Once upon a time", "max_tokens": 4},
    CHAT: {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 4},
    "/tokenize": {"prompt": "Once"},
    "/detokenize": {"tokens": [5]},
}
Refused = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def unhurt(real: LiveServer, http: httpx.Client) -> Iterator[None]:
    """After each attack the same engine answers, and nothing is left of the attack."""
    before = real.engine_pid
    yield
    assert http.post(NATIVE, json=GOOD[NATIVE]).status_code == 200
    assert real.engine_pid == before
    real.wait_idle()


def refuse_everywhere(http: httpx.Client, refused: Refused, fields: dict[str, Any], paths: tuple[str, ...] = GENERATING) -> None:
    """All routes say 400, whether they were to stream or not."""
    for path in paths:
        for stream in ({},) if path not in OPENAI else ({}, {"stream": True}):
            refused(http.post(path, json={**GOOD[path], **fields, **stream}))


def serve_everywhere(http: httpx.Client, fields: dict[str, Any], paths: tuple[str, ...] = GENERATING) -> list[str]:
    """All routes answer; what they said."""
    replies = [http.post(path, json={**GOOD[path], **fields}) for path in paths]
    assert [reply.status_code for reply in replies] == [200] * len(paths), replies[0].text[:300]
    return [reply.text for reply in replies]


# ------------------------------------------------------------------------------------------- one request kills the engine


def test_CVE_2024_8768_empty_prompts(http: httpx.Client, refused: Refused) -> None:
    refused(http.post(NATIVE, json={"prompt": ""}))
    for prompt in ("", [], [""], [[]], ["a", ""], [[1], []]):
        refused(http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 2}))
    refused(http.post(CHAT, json={"messages": [], "max_tokens": 2}))
    for content in ("", [], [{"type": "text", "text": ""}]):
        assert http.post(CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 2}).status_code == 200
    assert http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["count"] == 0
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_vllm_6521_echo_without_tokens(http: httpx.Client, refused: Refused) -> None:
    for more in ({}, {"logprobs": 1}, {"n": 2}, {"stream": True}, {"prompt": ["a", "b"]}):
        refused(http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "echo": True, **more, "max_tokens": 0}))
        reply = http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "echo": True, **more, "max_tokens": 1, "temperature": 1})
        assert reply.status_code == 200
    refuse_everywhere(http, refused, {"max_tokens": 0})
    refuse_everywhere(http, refused, {"echo": True}, (NATIVE, CHAT))


BAD_SCHEMAS = [
    {"type": "wolf"}, {"type": 5}, {"type": ["string", 5]}, {"properties": 5}, {"properties": {"a": 5}}, {"enum": []}, {"enum": 5},
    {"$ref": "#/$defs/none"}, {"$ref": "http://192.0.2.1/x"}, {"type": "string", "pattern": "("}, {"type": "string", "pattern": 5},
    {"type": "string", "pattern": "[z-a]"}, {"type": "array", "items": 5}, {"type": "array", "minItems": "x"},
    {"patternProperties": {"(": {}}}, {"anyOf": []}, {"type": "object", "required": 5},
]  # fmt: skip
BAD_PATTERNS = ["(", ")", "[", "a{5,2}", "*", "(?<!a)b", r"(a)\1", "[z-a]", "(?P<x", "a" * 300_000]
EMPTY: list[dict[str, Any]] = [
    {}, {"json": ""}, {"regex": ""}, {"grammar": ""}, {"choice": []}, {"choice": [""]}, {"json": None}, {"json_object": False},
    {"json": "null"}, {"json": "[]"}, {"json": "{"},
]  # fmt: skip


def as_every_kind(pattern: str) -> list[dict[str, Any]]:
    """Wherever a request may bring a regular expression."""
    schema = {"type": "string", "pattern": pattern}
    return [
        {"structured_outputs": {"regex": pattern}},
        {"structured_outputs": {"grammar": f"start: /{pattern}/"}},
        {"structured_outputs": {"grammar": "start: %json " + json.dumps(schema)}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"structured_outputs": {"json": {"type": "object", "patternProperties": {pattern: {}}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ]


def tool(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}], "tool_choice": "required"}


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_CVE_2025_48942_invalid_schemas(http: httpx.Client, refused: Refused, schema: Any) -> None:
    refuse_everywhere(http, refused, {"structured_outputs": {"json": schema}}, OPENAI)
    refuse_everywhere(http, refused, {"structured_outputs": {"json": json.dumps(schema)}}, OPENAI)
    named = {"name": "x", "schema": schema}
    refuse_everywhere(http, refused, {"response_format": {"type": "json_schema", "json_schema": named}}, OPENAI)
    refuse_everywhere(http, refused, {"structured_outputs": {"grammar": "start: %json " + json.dumps(schema)}}, OPENAI)


@pytest.mark.parametrize("pattern", BAD_PATTERNS, ids=lambda p: p[:12])
def test_CVE_2025_48943_invalid_patterns(http: httpx.Client, refused: Refused, pattern: str) -> None:
    for fields in as_every_kind(pattern):
        refuse_everywhere(http, refused, fields, OPENAI)


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_CVE_2025_48944_malformed_parameters_of_tools(http: httpx.Client, refused: Refused, schema: Any) -> None:
    for parameters in (schema, {"type": "object", "properties": {"a": schema}}):
        demanded = tool(parameters)
        refuse_everywhere(http, refused, demanded, (CHAT,))
        refuse_everywhere(http, refused, {**demanded, "tool_choice": {"type": "function", "function": {"name": "f"}}}, (CHAT,))
        demanded["tools"][0]["function"]["strict"] = True
        refuse_everywhere(http, refused, {**demanded, "tool_choice": "auto"}, (CHAT,))
    refuse_everywhere(http, refused, tool("x"), (CHAT,))


def test_CVE_2026_105757_faults_of_a_grammar_stay_with_its_request(
    real: LiveServer, http: httpx.Client, refused: Refused
) -> None:
    for empty in EMPTY:
        refuse_everywhere(http, refused, {"structured_outputs": empty}, OPENAI)
    bystander = {**GOOD[COMPLETIONS], "temperature": 0, "max_tokens": 24, "logprobs": 1}
    clean = http.post(COMPLETIONS, json=bystander).json()["choices"]
    stop = threading.Event()

    def attack() -> None:
        while not stop.is_set():
            for grammar in ('start: "a" start', "start: /(a|b)*c/ start", "start: x"):
                httpx.post(real.url + COMPLETIONS, json={**GOOD[COMPLETIONS], "structured_outputs": {"grammar": grammar}})

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        for _ in range(10):
            assert http.post(COMPLETIONS, json=bystander).json()["choices"] == clean
    finally:
        stop.set()
        thread.join()


def test_CVE_2026_44223_penalties_beside_tokens_that_are_certain(http: httpx.Client) -> None:
    """Certain tokens of a grammar are verified as drafts are: several of a row in one step, beside rows with penalties."""
    fields = [
        {"structured_outputs": {"choice": ["the quick brown fox jumps over the lazy dog"]}, "max_tokens": 40},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1.5, "temperature": 1, "max_tokens": 40},
        {"structured_outputs": {"choice": ["a fox"]}, "frequency_penalty": 2.0, "logprobs": 2, "max_tokens": 40},
    ]
    codes: list[int] = []

    def ask(more: dict[str, Any]) -> None:
        codes.append(http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], **more}).status_code)

    threads = [threading.Thread(target=ask, args=(more,)) for more in fields * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 12


def test_CVE_2026_105922_penalties_at_their_ends(http: httpx.Client, refused: Refused) -> None:
    size = max(http.post("/tokenize", json={"prompt": "fox"}).json()["tokens"])
    for name, low, high in (("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("repetition_penalty", 1e-300, 1e300)):
        for value in (low, high):
            serve_everywhere(http, {name: value, "temperature": 1})
            last = {"prompt": [0, size, 0, size], "max_tokens": 3, name: value}
            assert http.post(COMPLETIONS, json=last).status_code == 200
    for bad in ({"presence_penalty": 2.1}, {"frequency_penalty": -3}, {"repetition_penalty": 0}, {"repetition_penalty": -1}):
        refuse_everywhere(http, refused, bad)


def test_CVE_2026_114051_min_tokens_above_max_tokens(http: httpx.Client, refused: Refused) -> None:
    for fields in (
        {"min_tokens": 5, "max_tokens": 4}, {"min_tokens": 10**6, "max_tokens": None}, {"min_tokens": 10**6}, {"min_tokens": -1},
        {"min_tokens": 2**63}, {"min_tokens": 10**30},
    ):  # fmt: skip
        refuse_everywhere(http, refused, fields)
    refuse_everywhere(http, refused, {"min_tokens": 9, "max_tokens": 50, "max_completion_tokens": 3}, (CHAT,))


def test_CVE_2026_116173_too_many_logprobs(http: httpx.Client, refused: Refused) -> None:
    for count in (21, 128, 10**9, 2**63, -1):
        refuse_everywhere(http, refused, {"logprobs": count}, (COMPLETIONS,))
        refuse_everywhere(http, refused, {"logprobs": True, "top_logprobs": count}, (CHAT,))
        refuse_everywhere(http, refused, {"prompt_logprobs": count}, OPENAI)
    refuse_everywhere(http, refused, {"logprob_token_ids": list(range(129))})


@pytest.mark.parametrize("salt", ["", "\x00", "a\nb", "é😀", "\u2028", "x" * 100_000, "../../x", "%s", "\ufffd"], ids=lambda s: ascii(s[:8]))
def test_CVE_2026_105756_salts_of_any_characters(http: httpx.Client, salt: str) -> None:
    serve_everywhere(http, {"cache_salt": salt}, OPENAI)


def test_CVE_2026_44222_special_tokens_as_text(http: httpx.Client) -> None:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<pad>", "<|image_pad|>", "<|vision_start|>", "<|video_pad|>",
             "<image>", "[IMG]", "<tool_call>", "</think>", "<|start|>", "<0x0A>"]  # fmt: skip
    for text in (*words[:4], "".join(words) * 5):
        for fields, path in (({"prompt": text}, NATIVE), ({"prompt": [text]}, COMPLETIONS), ({"stop": [text]}, NATIVE)):
            assert http.post(path, json={**GOOD[path], **fields}).status_code == 200
        for role in ("user", "system", "assistant"):
            chat = {"messages": [{"role": role, "content": text}, {"role": "user", "content": text}], "max_tokens": 2}
            assert http.post(CHAT, json=chat).status_code == 200
        assert http.post("/tokenize", json={"messages": chat["messages"]}).status_code == 200


NOT_TAKEN = {
    "CVE-2025-62372": {"prompt_embeds": "AAAA"},
    "PYSEC-2026-2303": {"prompt_embeds": ["AAAA"]},
    "CVE-2025-62164": {"prompt_embeds": "gANjb3MKc3lzdGVtCnEAWAQAAABleGl0cQGFcQJScQMu"},
    "CVE-2026-56340": {"prompt_embeds": {"layout": "sparse"}},
    "CVE-2026-73557": {"prompt_embeds": "", "enable_prompt_embeds": True},
    "CVE-2026-94622": {"kv_transfer_params": {"remote_block_ids": [1]}},
    "CVE-2026-94623": {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "192.0.2.1"}},
    "CVE-2026-94624": {"kv_transfer_params": {"remote_port": 5}},
    "CVE-2026-94626": {"kv_transfer_params": {"tp_size": 10**9}},
    "CVE-2026-94627": {"kv_transfer_params": {"transfer_id": "x"}, "n": 2},
    "CVE-2026-111392": {"mm_hashes": ["a"]},
    "CVE-2026-115912": {"mm_shm_handle": "/psm_x"},
    "CVE-2026-107183": {"chat_parser": "x"},
    "CVE-2026-7304": {"custom_logit_processor": "gANjb3MKc3lzdGVtCg=="},
    "CVE-2026-86793": {"serialized_named_tensors": ["gANjb3MKc3lzdGVtCg=="]},
    "CVE-2025-61620": {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    "GHSA-fpch-3xrf-7q96": {"thinking_token_budget": 1},
    "CVE-2026-112266": {"rid": "a"},
}


@pytest.mark.parametrize("advisory", NOT_TAKEN)
def test_what_no_client_may_name(http: httpx.Client, refused: Refused, advisory: str) -> None:
    """Tensors, handles, templates, ids and hashes are the server's own: a field for one is refused by its name."""
    for path in GOOD:
        for fields in ({name: value} for name, value in NOT_TAKEN[advisory].items() if name != "n"):
            told = refused(http.post(path, json={**GOOD[path], **fields}))
            assert told["param"] in fields


def test_a_chat_without_a_named_request_id(http: httpx.Client, refused: Refused) -> None:
    refuse_everywhere(http, refused, {"request_id": "a"})


URLS = ["http://127.0.0.1:1/x", "http://192.0.2.1/x", "http://[::1]/", "http://0x7f000001/", "http://a@192.0.2.1#@x/", "file:///etc/passwd",
        "data:image/png;base64,AAAA", "ftp://192.0.2.1/x", "http:\\\\192.0.2.1\\x", "gopher://192.0.2.1/"]  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "CVE-2026-24779": {"type": "image_url", "image_url": {"url": URLS[0]}},
    "CVE-2026-25960": {"type": "image_url", "image_url": {"url": URLS[8]}},
    "CVE-2026-34753": {"type": "video_url", "video_url": {"url": URLS[1]}},
    "CVE-2026-63764": {"type": "image_url", "image_url": URLS[2]},
    "GHSA-7mpg-jvqj-ccxr": {"type": "image", "image": URLS[3]},
    "CVE-2026-34755": {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + "AAAA," * 10_000}},
    "CVE-2026-100650": {"type": "audio_url", "audio_url": {"url": URLS[4]}},
    "CVE-2026-105758": {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}},
    "CVE-2026-22773": {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    "PYSEC-2026-4353": {"type": "image_embeds", "image_embeds": {"grid": [0, 0, 0]}},
    "CVE-2026-105754": {"type": "image_url", "image_url": {"url": URLS[6]}, "uuid": "somebody-elses"},
    "CVE-2026-22778": {"type": "image_url", "image_url": {"url": "data:image/jp2;base64,AAAA"}},
    "CVE-2025-46722": {"type": "image_pil", "image_pil": "AAAA"},
}


@pytest.mark.parametrize("advisory", PARTS)
def test_nothing_is_fetched_or_decoded(http: httpx.Client, refused: Refused, advisory: str) -> None:
    for part in (PARTS[advisory], {**PARTS[advisory], "type": "text"}, {**PARTS[advisory], "text": "x"}):
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
        for path, fields in ((CHAT, {"max_tokens": 2}), ("/tokenize", {})):
            refused(http.post(path, json={"messages": messages, **fields}))
    for url in URLS:
        refused(http.post(CHAT, json={"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}))


def test_llama_cpp_7038_a_stop_string_that_begins_the_text(http: httpx.Client) -> None:
    first = http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "temperature": 0, "max_tokens": 1}).json()["choices"][0]["text"]
    assert first
    for stop in (first, first[:1], [first, first[:1], first * 2]):
        for more in ({"logprobs": 2}, {"logprobs": 0, "echo": True}, {"n": 1}, {"stream": True, "logprobs": 1}):
            body = {**GOOD[COMPLETIONS], "temperature": 0, "max_tokens": 8, "stop": stop, **more}
            reply = http.post(COMPLETIONS, json=body)
            assert reply.status_code == 200
            if not body.get("stream"):
                choice = reply.json()["choices"][0]
                assert choice["finish_reason"] == "stop" and choice["text"] in ("", GOOD[COMPLETIONS]["prompt"])
    chat = http.post(CHAT, json={**GOOD[CHAT], "temperature": 0}).json()["choices"][0]["message"]["content"]
    body = {**GOOD[CHAT], "temperature": 0, "stop": chat[:2], "logprobs": True, "top_logprobs": 2}
    assert http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == ""


def test_CVE_2025_23310_nesting(http: httpx.Client, refused: Refused) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}"), ('{"properties":{"a":', "}}"), ('{"anyOf":[', "]}")):
        for depth in (101, 990, 5000, 100_000):
            text = opening * depth + "1" + closing * depth
            for path in GOOD:
                for field in ("prompt", "messages", "tokens", "metadata", "chat_template_kwargs", "tools", "structured_outputs"):
                    body = json.dumps(GOOD[path])[:-1] + f', "{field}": {text}' + "}"
                    refused(http.post(path, content=body, headers={"content-type": "application/json"}))
            call = {"function": {"name": "f", "arguments": text}}
            refused(http.post(CHAT, json={"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]}))
            refused(http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "structured_outputs": {"json": text}}))


def test_what_may_be_nested_is_walked_to_its_end(http: httpx.Client) -> None:
    """As deep as the bound lets through, everywhere."""
    deep: Any = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    codes = [
        http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "structured_outputs": {"json": deep}}).status_code,
        http.post(CHAT, json={**GOOD[CHAT], **tool(deep)}).status_code,
        http.post(CHAT, json={**GOOD[CHAT], "metadata": deep}).status_code,
    ]
    assert set(codes) <= {200, 400} and codes[0] == codes[2] == 200


# ------------------------------------------------------------------------------------------------------------- exhaustion


def rss_mib(live: LiveServer) -> float:
    for line in Path(f"/proc/{live.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def test_CVE_2025_48956_huge_headers(real: LiveServer) -> None:
    port, before = int(real.url.rsplit(":", 1)[1]), rss_mib(real)
    for start in (b"GET /", b"GET / HTTP/1.1\r\nX: ", b"POST /generate HTTP/1.1\r\nContent-Length: 5\r\nA: b\r\nX"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                sock.sendall(start)
                for _ in range(1600):
                    sock.sendall(b"a" * 65536)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100).split()[1:2] in ([b"431"], [])
    assert rss_mib(real) - before < 32


def test_CVE_2026_34756_many_texts_of_one_prompt(http: httpx.Client, refused: Refused) -> None:
    for n in (129, 16384, 2**31, 10**30, 0, -1):
        refuse_everywhere(http, refused, {"n": n, "temperature": 1}, OPENAI)
        refuse_everywhere(http, refused, {"n": n, "use_beam_search": True}, (COMPLETIONS,))
    refuse_everywhere(http, refused, {"n": 2}, (NATIVE,))


def test_CVE_2024_8939_best_of(http: httpx.Client, refused: Refused) -> None:
    for count in (129, 10**9, 2**63, 0, -1):
        refuse_everywhere(http, refused, {"best_of": count, "temperature": 1})


def test_CVE_2026_73559_lists_of_prompts(http: httpx.Client, refused: Refused) -> None:
    for prompts in (["a"] * 1025, [[1]] * 2000, ["a"] * 100_000, [[1, 2]] * 300_000):
        refused(http.post(COMPLETIONS, json={"prompt": prompts, "max_tokens": 1}))
    refused(http.post(COMPLETIONS, json={"prompt": ["a"] * 100, "n": 11, "temperature": 1, "max_tokens": 1}))
    refused(http.post(COMPLETIONS, json={"prompt": ["a"] * 100, "best_of": 11, "temperature": 1, "max_tokens": 1}))
    refuse_everywhere(http, refused, {"prompt": ["a", "b"]}, (NATIVE, "/tokenize"))


def test_CVE_2026_71486_token_lists_without_bounds(http: httpx.Client, refused: Refused) -> None:
    """Decoding a million tokens takes seconds: they are counted first, and many are decoded beside the event loop."""
    refused(http.post("/detokenize", json={"tokens": [5] * 300_000}))
    refused(http.post(COMPLETIONS, json={"prompt": [5] * 300_000, "echo": True, "max_tokens": 1}))
    refused(http.post("/detokenize", json={"tokens": [-1]}))
    refused(http.post("/detokenize", json={"tokens": [2**31]}))
    assert len(http.post("/detokenize", json={"tokens": [300] * 50_000}).json()["prompt"]) >= 50_000
    assert http.post("/tokenize", json={"prompt": "fox " * 100_000, "return_token_strs": True}).json()["count"] >= 100_000


def test_CVE_2025_62426_template_values_that_are_no_values(http: httpx.Client, refused: Refused) -> None:
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "self",
                 "raise_exception", "range", "namespace", "conversation", "padding", "return_tensors", "__class__", ""):  # fmt: skip
        for path, fields in ((CHAT, GOOD[CHAT]), ("/tokenize", {"messages": GOOD[CHAT]["messages"]})):
            refused(http.post(path, json={**fields, "chat_template_kwargs": {name: True}}))


def test_CVE_2026_115918_no_other_route_renders_or_generates(http: httpx.Client) -> None:
    for path in ("/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/classify", "/invocations", "/v1/audio/speech",
                 "/v1/chat/completions/batch", "/v1/files", "/v1/batches", "/derender", "/render", "/v1/load_lora_adapter", "/update_weights"):  # fmt: skip
        assert http.post(path, json=GOOD[CHAT]).status_code in (404, 405)


REDOS = ["(a+)+b", "(a|a)*b", "(a|aa)+$", "(.*a){25}", "([a-zA-Z]+)*$", "(x+x+)+y", "(.*)*", "(a?){200}a{200}", "(a{1000}){1000}", "(a{1,1000}){1,1000}"]


@pytest.mark.parametrize("advisory", ["CVE-2026-55574", "PYSEC-2026-3933"])
def test_patterns_that_backtracking_never_ends(http: httpx.Client, advisory: str) -> None:
    """There is no backtracking in what follows them; each has its answer within the limits, and nobody waits for it."""
    for pattern in REDOS if advisory == "CVE-2026-55574" else REDOS[:3]:
        for fields in as_every_kind(pattern) + [tool({"type": "object", "properties": {"a": {"pattern": pattern, "type": "string"}}})]:
            for path in OPENAI if advisory == "CVE-2026-55574" or "tools" not in fields else (CHAT,):
                if "tools" in fields and path == COMPLETIONS:
                    continue
                assert http.post(path, json={**GOOD[path], **fields, "max_tokens": 3}).status_code in (200, 400)


def test_CVE_2026_25048_nested_parentheses(http: httpx.Client, refused: Refused) -> None:
    for depth in (3000, 30_000, 100_000):
        for opening, closing in (("(", ")"), ("(?:", ")*"), ("(a|", ")")):
            for fields in as_every_kind(opening * depth + "a" + closing * depth):
                refused(http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], **fields}))
        for grammar in ("start: " + "(" * depth + '"a"' + ")" * depth, "root ::= " + "(" * depth + '"a"' + ")" * depth, "start: " + "[" * depth):
            refused(http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "structured_outputs": {"grammar": grammar}}))


def test_CVE_2025_29770_nothing_is_kept_on_disk(real: LiveServer, http: httpx.Client) -> None:
    """Unique schemas leave no file behind: no process of the server writes anything."""

    def written() -> int:
        pids = [real.process.pid, *map(int, Path(f"/proc/{real.process.pid}/task/{real.process.pid}/children").read_text().split())]
        fields = (line.split() for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return sum(int(value) for name, value in fields if name == "write_bytes:")

    http.post(COMPLETIONS, json={**GOOD[COMPLETIONS], "structured_outputs": {"regex": "a"}})
    before = written()
    for i in range(150):
        body = {**GOOD[COMPLETIONS], "max_tokens": 2, "structured_outputs": {"json": {"type": "object", "properties": {f"name-{i}": {}}}}}
        assert http.post(COMPLETIONS, json=body).status_code == 200
    assert written() - before < 2**16  # a line of the log


def test_CVE_2026_109225_a_body_is_refused_before_it_is_read(real: LiveServer, refused: Refused) -> None:
    port, before = int(real.url.rsplit(":", 1)[1]), rss_mib(real)
    for path in GOOD:
        for framing in (b"Content-Length: 9000000000\r\n", b"Transfer-Encoding: chunked\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
                sock.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%s\r\n" % (path.encode(), framing))
                try:
                    for _ in range(200):
                        sock.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n" if b"chunked" in framing else b"a" * 65536)
                except OSError:
                    continue
                assert sock.recv(100).split()[1] == b"413"
    assert rss_mib(real) - before < 64


def test_CVE_2025_62727_ranges(http: httpx.Client) -> None:
    header = {"range": "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(5000))}
    for path in ("/version", "/v1/models", "/metrics", "/openapi.json", "/"):
        plain, ranged = http.get(path), http.get(path, headers=header)
        assert (ranged.status_code, "content-range" in ranged.headers) == (plain.status_code, False)


@pytest.mark.parametrize("advisory", ["CVE-2024-47874", "CVE-2025-54121"])
def test_forms_are_not_read(http: httpx.Client, refused: Refused, advisory: str) -> None:
    form = (b"--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n" + b"a" * 200_000 + b"\r\n") * 20 + b"--x--"
    kind = "multipart/form-data; boundary=x" if advisory == "CVE-2024-47874" else "application/x-www-form-urlencoded"
    for path in GOOD:
        refused(http.post(path, content=form, headers={"content-type": kind}))


def test_CVE_2024_12886_what_is_packed_is_not_unpacked(http: httpx.Client, refused: Refused) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"):
        for path in GOOD:
            headers = {"content-type": "application/json", "content-encoding": encoding}
            refused(http.post(path, content=b"\x1f\x8b" + b"x" * 100, headers=headers), 415)


# ------------------------------------------------------------------------------------------------ messages, files, sessions


@pytest.mark.parametrize("advisory", ["CVE-2026-22778", "CVE-2026-54236"])
def test_errors_tell_nothing_of_the_inside(http: httpx.Client, refused: Refused, advisory: str) -> None:
    odd: list[Any] = [None, True, [], {}, [[]], {"a": {}}, 1e308, -1, "x", "<object at 0x7f>", ["x", 1, None], {"role": {}}]
    for path in GOOD if advisory == "CVE-2026-22778" else (CHAT, "/tokenize"):
        for field in ("prompt", "messages", "tokens", "stop", "tools", "temperature", "logit_bias", "response_format", "structured_outputs",
                      "stream_options", "tool_choice", "documents", "chat_template_kwargs"):  # fmt: skip
            for value in odd:
                reply = http.post(path, json={**GOOD[path], field: value})
                if reply.status_code != 200:
                    refused(reply, 400)


@pytest.mark.parametrize("advisory", ["CVE-2026-7302", "CVE-2026-103663"])
def test_names_lead_to_no_files(http: httpx.Client, refused: Refused, advisory: str) -> None:
    names = ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "file:///etc/passwd", "sha256:../../x", "C:\\x", "a\x00b", "~/x", ""]
    for name in names:
        for path in (*OPENAI, "/tokenize", "/detokenize"):
            refused(http.post(path, json={**GOOD[path], "model": name}), 404)
        if "\x00" not in name:
            assert http.get(f"/v1/models/{name}").status_code in (404, 200 if name == "" else 404)
    for path in ("/api/pull", "/api/push", "/api/create", "/api/blobs/sha256:x", "/v1/files", "/upload", "/static/../../etc/passwd"):
        assert http.post(path, json={"name": "x"}).status_code == http.get(path).status_code == 404


def test_vllm_48853_a_prompt_that_ends_within_a_character(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Once upon a time \U0001f98a"}).json()["tokens"]
    for cut in range(1, 4):
        for stream in (False, True):
            body = {"prompt": ids[:-cut], "max_tokens": 6, "temperature": 0, "stream": stream}
            reply = http.post(COMPLETIONS, json=body)
            assert reply.status_code == 200 and "upon a time \\U" not in reply.text and "Once upon" not in reply.text[:400]


def test_SGLang_36552_a_turn_that_was_left_is_in_no_other(real: LiveServer, http: httpx.Client) -> None:
    """There are no sessions: what was generated for one request is in no other's context, whether it ended or was left."""
    body = {**GOOD[CHAT], "temperature": 0, "max_tokens": 16, "seed": 1}
    clean = http.post(CHAT, json=body).json()["choices"][0]["message"]
    for _ in range(5):
        with httpx.stream("POST", real.url + CHAT, json={**body, "max_tokens": 200, "stream": True, "user": "same"}) as reply:
            next(reply.iter_bytes())
        time.sleep(0.02)
        assert http.post(CHAT, json={**body, "user": "same"}).json()["choices"][0]["message"] == clean
