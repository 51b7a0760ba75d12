"""Everything a client can get wrong: the right status, one sentence, and a server that goes on serving."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted_engine import Live

from minivllm.server.fields import HARMLESS, NOT_SERVED
from minivllm.server.protocol import CHAT, COMPLETION

GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions")
TOKENIZING = ("/tokenize", "/detokenize")
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x", "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
TEXT_FIELD = {
    "/generate": '{"prompt": %s}',
    "/v1/completions": '{"prompt": %s}',
    "/v1/chat/completions": '{"messages": [{"role": "user", "content": %s}]}',
    "/tokenize": '{"prompt": %s}',
    "/detokenize": '{"tokens": [1], "model": %s}',
}
JSON = {"content-type": "application/json"}


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply that must be one, checked for form."""
    assert reply.status_code == status, reply.text[:300]
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.content) <= 4096
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    message = error["message"]
    assert re.fullmatch(r"[A-Za-z].{10,}[.]{1,3}", message, re.S), message
    for leak in ("minivllm", "msgspec", "Traceback", " at 0x", "/home", ".py", "object>", "site-packages", "utf-8' codec"):
        assert leak not in message
    return error


@pytest.fixture(autouse=True)
def still_serving(http: httpx.Client) -> Iterator[None]:
    """After each test every route still answers."""
    yield
    for path, body in GOOD.items():
        assert http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**9}, "input_tokens"),
        ({"max_tokens": 10**40}, "input_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"max_tokens": None, "min_tokens": 10**6}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "a" * 2000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"temperature": "1"}, "body.temperature"),
        ({"max_tokens": 1.5}, "body.max_tokens"),
        ({"max_tokens": True}, "body.max_tokens"),
        ({"stop": [1]}, "body.stop[0]"),
        ({"ignore_eos": "yes"}, "body.ignore_eos"),
        ({"wibble": 1}, "wibble"),
        ({"w" * 5000: 1}, "w" * 64 + "..."),
        ({"<script>\x00": 1}, "<script>\x00"),
    ],
)
def test_values(http: httpx.Client, path: str, fields: dict[str, Any], param: str) -> None:
    assert refusal(http.post(path, json={**GOOD[path], **fields}), 400)["param"] == param


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"5", b'{"prompt": "x"', b'{"prompt": "x"} trailing', b"\xff\xfe",
        b'{"prompt": "\xff"}', b"{'prompt': 'x'}", b'{"temperature": NaN}', b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"prompt":' + b"[" * 10**5 + b"]" * 10**5 + b"}", b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b'{"prompt": 5}', b'{"prompt": null, "messages": null, "tokens": null}', b"{}",
    ],
    ids=lambda b: b[:20].decode("latin-1"),
)  # fmt: skip
def test_bodies(http: httpx.Client, path: str, body: bytes) -> None:
    refusal(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 400, b"9" * 10**6, b"1" + b"0" * 10**5 + b".5"])
def test_numbers_without_end(http: httpx.Client, path: str, number: bytes) -> None:
    body = json.dumps(GOOD[path]).encode()[:-1] + b', "temperature": ' + number + b"}"
    refusal(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("text", [r'"\ud800"', r'"a\udfffb and more text"', r'"\ud83d\u0041"'])
def test_lone_surrogates(http: httpx.Client, path: str, text: str) -> None:
    refusal(http.post(path, content=TEXT_FIELD[path] % text, headers=JSON), 400)


@pytest.mark.parametrize("path", GENERATING)
def test_empty_and_long_prompts(http: httpx.Client, path: str) -> None:
    long = "fox " * 2000
    if path == "/v1/chat/completions":
        assert refusal(http.post(path, json={"messages": []}), 400)["param"] == "messages"
        error = refusal(http.post(path, json={"messages": [{"role": "user", "content": long}]}), 400)
    else:
        refusal(http.post(path, json={"prompt": ""}), 400)
        error = refusal(http.post(path, json={"prompt": long}), 400)
    assert error["message"].startswith("This model's maximum context length is 512 tokens.")


@pytest.mark.parametrize(
    "prompt",
    [[], [""], ["a", ""], [[]], [1, "a"], ["a", [1]], [-1], [10**6], [10**30], [[1], [10**6]], [True], [1.5], {"a": 1}],
)
def test_prompt_lists(http: httpx.Client, prompt: Any) -> None:
    refusal(http.post("/v1/completions", json={"prompt": prompt}), 400)


@pytest.mark.parametrize(
    "message",
    [
        {}, {"role": "user"}, {"content": "x"}, {"role": "wolf", "content": "x"}, {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]},
        {"role": "user", "content": [5]}, {"role": "user", "content": "x", "wibble": 1},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "x", "tool_call_id": "1"}, {"role": "tool", "content": None}, {"role": "assistant"},
        {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}, "type": "wolf"}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "user", "content": "x", "reasoning": "hm"},
        {"role": "user", "content": "x", "name": 5},
    ],
    ids=str,
)  # fmt: skip
def test_messages(http: httpx.Client, message: dict[str, Any]) -> None:
    refusal(http.post("/v1/chat/completions", json={"messages": [message]}), 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_unknown_model(http: httpx.Client, path: str) -> None:
    for name in ("wolf", "w" * 10**5, "", "../../etc/passwd"):
        error = refusal(http.post(path, json={**GOOD[path], "model": name}), 404)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")


@pytest.mark.parametrize("path", [p for p in GOOD if p != "/generate"])
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_content_type(http: httpx.Client, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    error = refusal(http.post(path, content=json.dumps(GOOD[path]), headers=headers), 400)
    assert error["message"].startswith("Unsupported Media Type: Only 'application/json' is allowed")


CHANGING = {
    "best_of": 2, "use_beam_search": True, "length_penalty": 0.5,
    "echo": True, "suffix": "x",
    "thinking_token_budget": 5,
    "spaces_between_special_tokens": False, "prompt_embeds": "x",
    "return_token_offsets": True, "return_prompt_text": True, "request_id": "x", "kv_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1}, "functions": [{"name": "x"}],
    "function_call": "auto", "verbosity": "low",
    "modalities": ["audio"],
    "audio": {"voice": "x"}, "prediction": {"type": "content"}, "web_search_options": {},
    "chat_template": "{{ 1 }}", "media_io_kwargs": {"a": 1}, "mm_processor_kwargs": {"a": 1},
    "store": True, "moderation": {"a": 1},
}  # fmt: skip


def test_every_field_that_is_not_served_has_a_value_to_try() -> None:
    assert set(CHANGING) == set(NOT_SERVED)


@pytest.mark.parametrize("name", CHANGING)
def test_fields_that_are_not_served_are_refused_by_name(http: httpx.Client, name: str) -> None:
    for form in (COMPLETION, CHAT):
        path = form.path
        if name in form.struct.__struct_fields__:
            continue  # one of the two serves it
        error = refusal(http.post(path, json={**GOOD[path], name: CHANGING[name]}), 400)
        assert error["param"] == name
        assert f"'{name}'" in error["message"]
        for harmless in (None, *NOT_SERVED[name]):
            assert http.post(path, json={**GOOD[path], name: harmless}).status_code == 200
    assert refusal(http.post("/generate", json={**GOOD["/generate"], name: CHANGING[name]}), 400)["param"] == name


def test_true_is_not_one(http: httpx.Client) -> None:
    chat = GOOD["/v1/chat/completions"]
    assert refusal(http.post("/v1/chat/completions", json={**chat, "best_of": True}), 400)["param"] == "best_of"


def test_harmless_fields_pass(http: httpx.Client) -> None:
    labels = {name: {"any": ["thing"]} for name in HARMLESS}
    assert http.post("/v1/chat/completions", json={**GOOD["/v1/chat/completions"], **labels}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_goes_together(http: httpx.Client, path: str) -> None:
    good = GOOD[path]
    error = refusal(http.post(path, json={**good, "stream_options": {"include_usage": True}}), 400)
    assert error["param"] == "stream_options"
    refusal(http.post(path, json={**good, "stream": True, "stream_options": {"wibble": 1}}), 400)
    assert refusal(http.post(path, json={**good, "priority": 3}), 400)["param"] == "priority"
    assert http.post(path, json={**good, "priority": 0, "cache_salt": "tenant"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_logprobs_of_prompts(http: httpx.Client, path: str) -> None:
    for more in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 0, "stream": True}):
        assert refusal(http.post(path, json={**GOOD[path], **more}), 400)["param"] == "prompt_logprobs"
    assert refusal(http.post(path, json={**GOOD[path], "prompt_logprobs": True}), 400)["param"] == "body.prompt_logprobs"


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1},
        {"presence_penalty": 1}, {"frequency_penalty": 1}, {"min_tokens": 1}, {"logit_bias": {"5": 1}}, {"bad_words": ["x"]},
        {"allowed_token_ids": [5]}, {"stop": ["x"]}, {"stop_token_ids": [5]}, {"prompt_logprobs": 1}, {"best_of": 3},
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}}, {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}}, {"n": 0}, {"n": 11}, {"length_penalty": 11}, {"length_penalty": -11},
        {"echo": True, "logprobs": 1}, {"logprobs": 21}, {"max_tokens": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_beam_search_has_not(http: httpx.Client, more: dict[str, Any]) -> None:
    body = {**GOOD["/v1/completions"], "use_beam_search": True, "n": 2, **more}
    assert refusal(http.post("/v1/completions", json=body), 400)["param"] == next(iter(more))


def test_beam_search_and_the_rest(http: httpx.Client) -> None:
    good = {"prompt": ["x", "y"], "use_beam_search": True, "n": 2, "max_tokens": 2}
    for more in ({"temperature": 0}, {"temperature": 1}, {"top_p": 1, "top_k": 0, "stop": [], "best_of": 2}, {"seed": 5}):
        assert http.post("/v1/completions", json={**good, **more}).status_code == 200
    error = refusal(http.post("/v1/completions", json={**good, "max_tokens": 10**6}), 400)
    assert error["param"] == "input_tokens"
    error = refusal(http.post("/v1/completions", json={**GOOD["/v1/completions"], "length_penalty": 2.0}), 400)
    assert error["param"] == "length_penalty"
    assert refusal(http.post("/v1/completions", json={**good, "prompt": ["x"] * 600}), 400)["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("value", "param"), [
    ({"max_pattern_size": -1}, ""), ({"max_pattern_size": 513, "min_count": 2}, ""), ({"min_pattern_size": 2}, ""),
    ({"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}, ""), ({"max_pattern_size": 3}, ""), ({"min_count": 2}, ""),
    ({"max_pattern_size": 3, "min_count": 1}, ""), ({"max_pattern_size": 3, "min_count": 10**30}, ""),
    ({"max_pattern_size": 3, "min_pattern_size": -1, "min_count": 2}, ""), (5, "body."), ({"max_pattern_size": "3"}, "body."),
    ({"max_pattern_size": 2, "min_count": 2, "wibble": 1}, "body."),
])
def test_repetitions(http: httpx.Client, path: str, value: Any, param: str) -> None:
    error = refusal(http.post(path, json={**GOOD[path], "repetition_detection": value}), 400)
    assert error["param"].startswith(f"{param}repetition_detection")
    for good in ({}, {"max_pattern_size": 0}, {"max_pattern_size": 3, "min_count": 2}):
        assert http.post(path, json={**GOOD[path], "repetition_detection": good}).status_code == 200


def test_the_best_of_too_few(http: httpx.Client) -> None:
    for more in ({"best_of": 1, "n": 2}, {"best_of": 0}, {"best_of": 129}, {"best_of": 2, "stream": True},
                 {"best_of": 2, "temperature": 0}):  # fmt: skip
        assert refusal(http.post("/v1/completions", json={**GOOD["/v1/completions"], **more}), 400)["param"] == "best_of"
    many = {"prompt": ["x"] * 20, "best_of": 100}
    assert refusal(http.post("/v1/completions", json=many), 400)["param"] == "prompt"


def test_too_many_logprobs_of_prompts(http: httpx.Client) -> None:
    many = {"prompt": [[5] * 500] * 450, "max_tokens": 1}
    for more in ({"prompt_logprobs": 20}, {"prompt_logprobs": 9, "n": 2}, {"echo": True, "logprobs": 20}):
        assert refusal(http.post("/v1/completions", json={**many, **more}), 400)["param"] == "prompt_logprobs"


def test_tokenize_needs_one_source(http: httpx.Client) -> None:
    refusal(http.post("/tokenize", json={"prompt": "x", "messages": []}), 400)
    refusal(http.post("/tokenize", json={"prompt": "x", "add_generation_prompt": True}), 400)
    for tokens in ([-1], [10**6], [10**30], ["a"], None):
        refusal(http.post("/detokenize", json={"tokens": tokens}), 400)


def test_ten_megabytes(http: httpx.Client) -> None:
    for path in GOOD:
        error = refusal(http.post(path, content=b'{"prompt": "' + b"x" * 10**7 + b'"}', headers=JSON), 413)
        assert error["type"] == "Payload Too Large"

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 10**5

        refusal(http.post(path, content=chunks(), headers=JSON), 413)


def test_compressed_bodies(http: httpx.Client) -> None:
    for path in GOOD:
        refusal(http.post(path, content=b"x", headers={**JSON, "content-encoding": "gzip"}), 415)


def test_routes_and_methods_that_are_not_there(http: httpx.Client) -> None:
    refusal(http.get("/wibble"), 404)
    refusal(http.get("/v1/../etc/passwd"), 404)
    assert refusal(http.get("/v1/completions"), 405)["type"] == "Method Not Allowed"


def test_a_fault_of_ours_tells_nothing_of_the_inside(http: httpx.Client, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret at /home/somewhere.py")

    monkeypatch.setattr(live.llm, "open", broken)
    for path in GENERATING:
        error = refusal(http.post(path, json=GOOD[path]), 500)
        assert "secret" not in error["message"]
