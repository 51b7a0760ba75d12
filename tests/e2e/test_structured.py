"""Structured output by the official client from the real server process with the bundled model."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer, serve

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["bears", "foxes", "cake"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve() as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    messages = [{"role": "user", "content": "Tell me of somebody."}]
    return client.chat.completions.create(**{"model": "stories", "messages": messages, "max_tokens": 200, "seed": 7, **more})


def complete(client: openai.OpenAI, asked: dict[str, Any], **more: Any) -> Any:
    wanted = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 60, "seed": 7, **more}
    return client.completions.create(**wanted, extra_body={"structured_outputs": asked})


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "likes"], "properties come in the schema's order"
    assert len(person["name"]) <= 24 and 0 <= person["age"] <= 99
    assert 1 <= len(person["likes"]) <= 3 and set(person["likes"]) <= {"bears", "foxes", "cake"}


def test_a_schema_with_everything_else(client: openai.OpenAI) -> None:
    """Seeds, several texts, logprobs and a stream give the texts that each gives alone."""
    texts = [choice.message.content for choice in chat(client, n=3, response_format=FORMAT).choices]
    for text in texts:
        check_person(text)
    with_logprobs = chat(client, n=3, response_format=FORMAT, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in with_logprobs.choices] == texts
    for choice in with_logprobs.choices:
        assert choice.finish_reason == "stop"
        told = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
        assert told.decode() == choice.message.content, "each token has its logprob, those that were certain too"
    streamed = dict.fromkeys(range(3), "")
    for chunk in chat(client, n=3, response_format=FORMAT, stream=True):
        for piece in chunk.choices:
            streamed[piece.index] += piece.delta.content or ""
    assert list(streamed.values()) == texts


def test_other_kinds(client: openai.OpenAI, server: LiveServer) -> None:
    brace = httpx.post(f"{server.url}/tokenize", json={"prompt": "}"}).json()["tokens"][0]
    any_object = chat(client, response_format={"type": "json_object"}, logit_bias={str(brace): 8}).choices[0]
    assert isinstance(json.loads(any_object.message.content), dict) and any_object.finish_reason == "stop"
    assert complete(client, {"choice": ["a small fox", "a big bear"]}).choices[0].text in ("a small fox", "a big bear")
    assert re.fullmatch(r"[A-Z][a-z]{3,9} [0-9]{4}", complete(client, {"regex": "[A-Z][a-z]{3,9} [0-9]{4}"}).choices[0].text)
    lark = complete(client, {"grammar": 'start: animal " and " animal\nanimal: "fox" | "bear" | "cat"'}).choices[0]
    assert re.fullmatch("(fox|bear|cat) and (fox|bear|cat)", lark.text) and lark.finish_reason == "stop"
    gbnf = complete(client, {"grammar": 'root ::= ("fox" | "bear") [0-9] [0-9]'}).choices[0]
    assert re.fullmatch("(fox|bear)[0-9][0-9]", gbnf.text)
    compact = complete(client, {"json": PERSON, "disable_any_whitespace": True}, max_tokens=100).choices[0].text
    check_person(compact)
    assert compact == json.dumps(json.loads(compact), separators=(",", ":"))
    cut = complete(client, {"json": PERSON}, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"structured_outputs": {"json": {"type": "objekt"}}}, "objekt"),
        ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, 'unknown name: "x"'),
        ({"structured_outputs": {"choice": []}}, "choice takes from 1"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one of"),
        ({"structured_outputs": {"json": "{"}}, "not valid JSON"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "send one"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "unknown field `schema`"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "a{1000}{1000}{1000}"}}, "lower the numbers"),
        ({"structured_outputs": {"grammar": 'start: a\na: %json {"not": {}}'}}, "uses `not`"),
    ],
)
def test_what_cannot_be_followed_is_refused(client: openai.OpenAI, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="stories", prompt="x", extra_body=asked)
    assert says in str(refused.value)
    assert client.completions.create(model="stories", prompt="x", max_tokens=1).choices


def test_a_grammar_that_nothing_can_follow_ends_its_request_alone(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["yes", "no"]}, "allowed_token_ids": [5, 6]}
    with pytest.raises(openai.BadRequestError, match="No token is left"):
        client.completions.create(model="stories", prompt="x", extra_body=extra)
    assert complete(client, {"choice": ["yes", "no"]}).choices[0].text in ("yes", "no")
