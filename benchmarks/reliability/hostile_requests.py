# ruff: noqa: E501  (tables of texts)
"""Requests that nobody means well with: made from the routes' own schemas, from a corpus of known attacks, and at random.

``Attacker(seed).next()`` gives one after the other, the same for a seed. Every field of every route's schema is reflected
(``msgspec.inspect``), so a new field is attacked without a change here: with the values of its type, with those of every other
type, and in pairs with every other field. What no JSON library would write (NaN, numbers without end, half a character, a name
twice) is put in as text.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from minivllm.server.fields import NOT_SERVED
from minivllm.server.protocol import FORMS

GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Once upon", "max_tokens": 2},
    "/v1/completions": {"prompt": "Once upon", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "Once upon"},
    "/detokenize": {"tokens": [5, 6]},
}
STRUCTS = {form.path: form.struct for form in FORMS}


def raw(text: str) -> str:
    """Stands for ``text`` in a body, without quotes."""
    return f"@@{text}@@"


def dump(body: Any) -> bytes:
    """JSON, with what ``raw`` marked as it stands."""
    return re.sub(r'"@@(.*?)@@"', lambda found: json.loads(f'"{found[1]}"'), json.dumps(body)).encode("utf-8", "replace")


NUMBERS = [0, raw("-0.0"), -1, 1, 2, 3, 7, 127, 128, 1000, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1,
           2**64, 10**30, raw("1e308"), raw("-1e308"), raw("1e-308"), raw("5e-324"), raw("1e400"), raw("NaN"), raw("Infinity"),
           raw("-Infinity"), raw("9" * 5000), raw("0." + "3" * 5000), raw("1e99999"), 0.5, 1.5, 1.0, 2.0, -2.0, -0.5, 0.1, 1e-5, 1e-6,
           raw("01"), raw("+1"), raw("0x10"), raw("1_000"), raw("1."), raw(".5")]  # fmt: skip
WORDS = ["", "a", " ", "x" * 10_000, "\x00", "\x1b[31m", "a\r\nb", "\u2028", "\u202e", "\U0001f98a" * 50, "\ufffd", "é" * 300, "../../etc/passwd",
         "/etc/passwd", "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "'; DROP TABLE x; --", "<script>", "%s%n%d", "${jndi:ldap://x}",
         "http://192.0.2.1/x", "file:///etc/passwd", "data:image/png;base64,AAAA", "<|endoftext|>", "<|im_end|><|im_start|>system",
         "</s>", "<s>", "[INST]", "<think>", "</tool_call>", "1", "true", "null", "NaN", "auto", "none", "required", "stories", "wolf",
         raw(r"\"\\ud800\""), raw(r"\"\\udfff and more\""), raw(r"\"\\ud83d\\u0041\""), "a" * 70, "\u0301" * 1000]  # fmt: skip
OTHERS = [None, True, False, [], {}, [[]], [None], {"a": None}, [[[[[]]]]], {"": {"": {"": {}}}}]
REGEXES = [
    "(a+)+b", "(a|a)*b", "(a|aa)+$", "(.*a){20}", "([a-zA-Z]+)*$", "(.*)*", "((a*)*)*", "(a?){200}a{200}", "(a{1000}){1000}", "a{2147483647}",
    "a{0,999999}", "(" * 3000 + "a" + ")" * 3000, "(" * 30000 + "a" + ")" * 30000, "[" * 5000, "(?=a)b", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)",
    "\\", "[z-a]", "a**", "{", "(", ")", "(?i)" * 100 + "a", "|" * 5000, "(a|b|c|d|e|f){1,300}", r"\p{L}{1,300}", r"[^\x00-\x7f]{500}", "",
    "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$", "(.|\n)*" * 50, "(?:a|b|ab)*" * 100, "\x00", "a" * 100_000, ".{5000}", "(.{1,100}){1,100}",
    r"\u{110000}", r"\ud800", "(?s).*" * 200, r"(\w{1,50}\s){1,50}", "a{,}", "a{5,2}", "(?#" + "x" * 10000 + ")",
]  # fmt: skip
SCHEMAS: list[Any] = [
    {"type": "array", "minItems": 10**6}, {"type": "array", "maxItems": 2**63}, {"type": "string", "minLength": 10**9},
    {"type": "string", "maxLength": -1}, {"enum": [str(i) for i in range(20_000)]}, {"enum": ["x" * 1000 + str(i) for i in range(300)]},
    {"enum": []}, {"const": "x" * 100_000}, {"type": "wolf"}, {"type": 5}, {"type": []}, {"type": ["string", "wolf"]},
    {"pattern": "(a+)+b", "type": "string"}, {"pattern": "(" * 3000, "type": "string"}, {"pattern": 5, "type": "string"},
    {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"$ref": "http://192.0.2.1/x"}, {"$ref": "file:///etc/passwd"}, {"$ref": 5},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    {"allOf": [{"type": "string"}] * 500}, {"anyOf": [{"type": "object", "properties": {str(i): {}}} for i in range(500)]},
    {"oneOf": [{}, {}]}, {"not": {}}, {"if": {}, "then": {}}, {"properties": {str(i): {"type": "string"} for i in range(3000)}},
    {"properties": {"x" * 30_000: {}}}, {"properties": 5}, {"properties": {"a": 5}}, {"required": "a"}, {"required": [5]},
    {"patternProperties": {"(a+)+$": {}}}, {"patternProperties": {"[": {}}}, {"additionalProperties": "x"}, {"items": [{}] * 500},
    {"minProperties": 10**9}, {"multipleOf": 0}, {"multipleOf": 1e-300, "type": "number"}, {"minimum": 1e308, "maximum": -1e308, "type": "number"},
    {"minimum": raw("NaN"), "type": "number"}, {"format": "x" * 1000, "type": "string"}, {"uniqueItems": True}, {"x-guidance": {"lenient": True}},
    {"x-guidance": 5}, {"minItems": 5000, "type": "array", "items": {"enum": ["a", "b"]}}, {"maxLength": 100_000, "type": "string"}, True, False,
    {"type": "integer", "minimum": -(10**30), "maximum": 10**30}, {"description": "x" * 200_000}, {"default": {"a": [1] * 1000}}, [], 5, "x", "{",
]  # fmt: skip
LARKS = ["start:", "start: start", 'start: "a" start', "start: x", "start: /(a+)+b/", "start: %json {", 'start: %json {"type": 5}',
         'start: %json {"type": "array", "minItems": 99999}', "root ::= root", 'root ::= "a"*', "start: " + "(" * 3000, "%import common.WORD\nstart: WORD",
         "%import /etc/passwd", "start: " + " | ".join(f'"{i}"' for i in range(5000)), 'start: "a"{1000000}', "start: /./{99999}", "\x00", "?" * 5000,
         "start: a\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)), 'start: "' + "x" * 100_000 + '"', "start: <[99999999]>", "start: <[-1]>",
         "start: <|endoftext|>", 'start: @x', "start: %regex {", "start[temperature=1e308]: /a/", 'start[max_tokens=0]: "a"', "start: ~"]  # fmt: skip
TEMPLATES = ["{{ 1 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}"]

# What published attacks on engines of this kind sent (docs/reliability.md names them), for any generating route.
CORPUS: list[dict[str, Any]] = [
    {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [""] * 100}, {"prompt": ["a"] * 5000}, {"prompt": [1] * 10_000},
    {"prompt": [[1, 2]] * 2000}, {"prompt": [2**31]}, {"prompt": [-1]}, {"prompt": [0] * 100}, {"prompt": "x" * 400_000}, {"messages": []},
    {"echo": True, "max_tokens": 0}, {"echo": True, "max_tokens": 1, "logprobs": 1}, {"echo": True, "stream": True, "logprobs": 0},
    {"min_tokens": 10**6, "max_tokens": None}, {"min_tokens": 10**6}, {"min_tokens": 5, "max_tokens": 2}, {"min_tokens": -1},
    {"n": 16384}, {"n": 2**31}, {"n": 129, "temperature": 1.0}, {"n": 128, "best_of": 10**9}, {"best_of": 10**9}, {"n": 0}, {"n": -1},
    {"logprobs": 10**9}, {"logprobs": 21}, {"top_logprobs": 10**6, "logprobs": True}, {"logprob_token_ids": list(range(200))},
    {"prompt_logprobs": 10**9}, {"prompt_logprobs": 20, "prompt": "a " * 100}, {"logit_bias": {"999999999": 1}}, {"logit_bias": {"-1": 1}},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"5": 1e308}}, {"logit_bias": {str(i): 1 for i in range(2000)}}, {"logit_bias": {"5": raw("NaN")}},
    {"bad_words": ["\ufffd"] * 300}, {"bad_words": [""]}, {"bad_words": ["x" * 70_000]}, {"allowed_token_ids": []}, {"allowed_token_ids": [10**9]},
    {"allowed_token_ids": [-1]}, {"allowed_token_ids": list(range(200_000))}, {"stop": ["x" * 2000]}, {"stop": [""]}, {"stop": ["a"] * 100},
    {"stop": "O", "logprobs": 1}, {"stop_token_ids": [-1]}, {"stop_token_ids": [2**31]}, {"stop_token_ids": list(range(10_000))},
    {"cache_salt": ""}, {"cache_salt": "a\x00b"}, {"cache_salt": "x" * 100_000}, {"cache_salt": "é😀"}, {"request_id": "a"}, {"priority": 2**63},
    {"priority": -(2**63)}, {"kv_transfer_params": {"tp_size": 10**9}}, {"kv_transfer_params": {"transfer_id": "x", "do_remote_prefill": True}},
    {"vllm_xargs": {"a": 1}}, {"prompt_embeds": "gANjb3MKc3lzdGVtCg=="}, {"mm_processor_kwargs": {"a": 1}}, {"mm_hashes": ["a"]}, {"rid": "a"},
    {"chat_template": TEMPLATES[1]}, {"chat_template": TEMPLATES[2]}, {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"messages": [], "add_generation_prompt": 5, "chat_template": "x"}}, {"chat_template_kwargs": {"x" * 100_000: 1}},
    {"chat_template_kwargs": {"raise_exception": 1, "range": 5}}, {"thinking_token_budget": -1}, {"custom_logit_processor": "x"}, {"lora_path": "/etc"},
    {"structured_outputs": {"json": ""}}, {"structured_outputs": {}}, {"structured_outputs": {"choice": []}}, {"structured_outputs": {"choice": [""]}},
    {"structured_outputs": {"choice": ["x" * 1000 + str(i) for i in range(1024)]}}, {"structured_outputs": {"regex": "a", "json": {}}},
    {"structured_outputs": {"structural_tag": {"a": 1}}}, {"guided_regex": "(a+)+b"}, {"guided_json": "x"}, {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wolf"}}}}, {"response_format": "json"},
    {"repetition_penalty": 1e308}, {"repetition_penalty": 1e-308}, {"repetition_detection": {"max_pattern_size": 512, "min_count": 2}},
    {"temperature": 1e-308}, {"top_k": -1}, {"seed": 2**63}, {"seed": -1}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -5},
    {"use_beam_search": True, "n": 10**6}, {"use_beam_search": True, "n": 3, "max_tokens": 3}, {"stream_options": {"include_usage": True}},
    {"model": "../../../etc/passwd"}, {"model": "x" * 100_000}, {"model": "{{ 1 }}"}, {"__proto__": {}}, {"constructor": {}}, {"__class__": "x"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": {"a": "x"}, "uuid": "x"}]}]},
    {"messages": [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>" * 50}]}, {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 5000}}]}]},
    {"messages": [{"role": "user", "content": "x"}] * 2000}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2000}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wolf", "pattern": "("}}}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "(a+)+b"}}}}}], "tool_choice": "auto"},
    {"tools": [{"type": "function", "function": {"name": "f" * 100}}]}, {"tools": [{}] * 1000}, {"tool_choice": {"type": "function"}},
    {"tokens": list(range(100_000))}, {"tokens": [-1]}, {"tokens": [2**63]}, {"max_tokens": -12806}, {"max_tokens": 2**63}, {"max_tokens": 0},
]  # fmt: skip


def info(field: msgspec.structs.FieldInfo) -> msgspec.inspect.Type:
    """What the type of a field is."""
    return msgspec.inspect.type_info(field.type)


@dataclass(frozen=True)
class Request:
    """Bytes for a connection; ``plain``: they are one whole HTTP request, which has to be answered."""

    data: bytes
    plain: bool = True


def post(path: str, body: bytes, more: str = "", kind: str = "application/json") -> Request:
    """A request with a body."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return Request(head.encode("latin-1", "replace") + body)


class Attacker:
    """Makes requests. Written by whoever asks for the next one."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._kinds = ((self.one_field, 26), (self.two_fields, 34), (self.many_fields, 10), (self.generated, 10), (self.from_corpus, 8),
                       (self.broken_bytes, 5), (self.not_served, 2), (self.odd_http, 4), (self.deep, 0.4), (self.grammar, 0.6))  # fmt: skip
        self._examples: list[tuple[str, bytes]] = []

    def next(self) -> Request:
        """The next request."""
        make = self.rng.choices([kind for kind, _ in self._kinds], [weight for _, weight in self._kinds])[0]
        return make()

    # By the schema.

    def value(self, kind: msgspec.inspect.Type, depth: int = 0) -> Any:
        """A value that has the type, more or less."""
        rng, inspect = self.rng, msgspec.inspect
        if isinstance(kind, inspect.UnionType):
            return self.value(rng.choice(kind.types), depth)
        if isinstance(kind, inspect.IntType | inspect.FloatType):
            return rng.choice(NUMBERS)
        if isinstance(kind, inspect.StrType):
            return rng.choice(WORDS)
        if isinstance(kind, inspect.BoolType):
            return rng.choice((True, False, 0, 1, "true"))
        if isinstance(kind, inspect.LiteralType):
            return rng.choice((*kind.values, "wolf", 1, None))
        if isinstance(kind, inspect.ListType | inspect.VarTupleType):
            count = rng.choice((0, 1, 1, 2, 3, 60, 300) if depth == 0 else (0, 1, 2))
            return [self.value(kind.item_type, depth + 1) for _ in range(count)]
        if isinstance(kind, inspect.DictType):
            count = rng.choice((0, 1, 1, 2, 3, 40) if depth == 0 else (0, 1, 2))
            return {self.name(): self.value(kind.value_type, depth + 1) for _ in range(count)}
        if isinstance(kind, inspect.StructType):
            fields = [f for f in kind.fields if rng.random() < 0.5]
            return {f.encode_name: self.value(f.type, depth + 1) for f in fields}
        return self.anything(depth)

    def name(self) -> str:
        """A key."""
        return self.rng.choice(("5", "-1", "role", "content", "type", "text", "function", "name", "", "x", "999999", "1.5", "schema", "a\x00"))

    def anything(self, depth: int) -> Any:
        """Any JSON."""
        rng = self.rng
        if depth > 4 or rng.random() < 0.5:
            return rng.choice((*NUMBERS, *WORDS, *OTHERS))
        if rng.random() < 0.5:
            return [self.anything(depth + 1) for _ in range(rng.randrange(3))]
        return {self.name(): self.anything(depth + 1) for _ in range(rng.randrange(4))}

    def odd(self, field: msgspec.structs.FieldInfo) -> Any:
        """A value for a field: mostly of its type."""
        return self.value(info(field)) if self.rng.random() < 0.75 else self.rng.choice((*NUMBERS, *WORDS, *OTHERS))

    def path(self) -> str:
        """A route; those that generate more often."""
        return self.rng.choices(list(GOOD), (3, 6, 6, 2, 1))[0]

    def with_fields(self, count: int) -> Request:
        """A good body with so many fields that are odd."""
        path = self.path()
        fields = msgspec.structs.fields(STRUCTS[path])
        chosen = self.rng.sample(fields, min(count, len(fields)))
        return self.send(path, {**GOOD[path], **{f.encode_name: self.odd(f) for f in chosen}})

    def one_field(self) -> Request:
        return self.with_fields(1)

    def two_fields(self) -> Request:
        return self.with_fields(2)

    def many_fields(self) -> Request:
        return self.with_fields(self.rng.randrange(3, 12))

    def send(self, path: str, body: Any) -> Request:
        """A body, sometimes streamed."""
        if isinstance(body, dict) and path != "/generate" and "stream" not in body and self.rng.random() < 0.2 and "max_tokens" in body:
            body = {**body, "stream": True}
        return post(path, dump(body))

    # By hypothesis, which knows odd texts and numbers of its own.

    def generated(self) -> Request:
        if not self._examples:
            self._examples = list(generate(self.rng.randrange(2**32), 200))
            self.rng.shuffle(self._examples)
        return post(*self._examples.pop())

    # By the corpus and by hand.

    def from_corpus(self) -> Request:
        path, more = self.path(), self.rng.choice(CORPUS)
        if self.rng.random() < 0.3:
            more = {**more, **self.rng.choice(CORPUS)}
        return self.send(path, {**GOOD[path], **more})

    def not_served(self) -> Request:
        path, name = self.path(), self.rng.choice(list(NOT_SERVED))
        return self.send(path, {**GOOD[path], name: self.anything(0)})

    def grammar(self) -> Request:
        """Something to follow that takes for ever, or cannot be followed at all."""
        rng, path = self.rng, self.rng.choice(("/v1/completions", "/v1/chat/completions"))
        kind = rng.choice(("regex", "json", "grammar", "schema", "tool"))
        if kind == "regex":
            more: dict[str, Any] = {"structured_outputs": {"regex": rng.choice(REGEXES)}}
        elif kind == "grammar":
            more = {"structured_outputs": {"grammar": rng.choice(LARKS)}}
        elif kind == "json":
            more = {"structured_outputs": {"json": rng.choice(SCHEMAS)}}
        elif kind == "schema":
            more = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(SCHEMAS)}}}
        else:
            function = {"name": "f", "parameters": rng.choice(SCHEMAS), "strict": rng.random() < 0.5}
            more = {"tools": [{"type": "function", "function": function}], "tool_choice": rng.choice(("required", "auto"))}
        return self.send(path, {**GOOD[path], **more})

    def deep(self) -> Request:
        """Brackets in brackets, where something is read as JSON."""
        rng, path = self.rng, self.path()
        depth = rng.choice((50, 99, 101, 500, 990, 1100, 100_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('{"properties":{"a":', "}}"), ('{"items":', "}")))
        inside = raw(opening.replace('"', '\\"') * depth + "1" + closing * depth)
        text = opening * depth + "1" + closing * depth
        more = rng.choice((
            {"chat_template_kwargs": {"x": inside}}, {"structured_outputs": {"json": inside}}, {"structured_outputs": {"json": text}},
            {"prompt": inside}, {"tools": [{"type": "function", "function": {"name": "f", "parameters": inside}}], "tool_choice": "required"},
            {"messages": [{"role": "user", "content": inside}]}, {"documents": [{"x": inside}]}, {"metadata": inside}, {"x": inside},
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": inside}}}},
        ))  # fmt: skip
        return self.send(path, {**GOOD[path], **more})

    def broken_bytes(self) -> Request:
        """A body that is cut, changed or doubled, or something else altogether."""
        rng, path = self.rng, self.path()
        body = bytearray(dump(GOOD[path]))
        kind = rng.randrange(6)
        if kind == 0:
            del body[rng.randrange(len(body)) :]
        elif kind == 1:
            for _ in range(rng.randrange(1, 6)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        elif kind == 2:
            body = bytearray(rng.choice((b"", b"[]", b"null", b"5", b'"x"', b"{}", b"{" * 5000, b"\xff\xfe{", b"\x00" * 100, b"[[" * 40_000)))
        elif kind == 3:
            body[-1:] = b', "temperature": 0.5, "temperature": "x", "prompt": 5}'
        elif kind == 4:
            body = body + body
        else:
            body[1:1] = b" " * rng.choice((1, 10_000)) + rng.choice((b"// x\n", b"/* x */", b"\xef\xbb\xbf", b'"\\u0070rompt": 1,'))
        return post(path, bytes(body))

    def odd_http(self) -> Request:
        """Requests that HTTP allows hardly or not at all; some of them end the connection."""
        rng, path = self.rng, self.path()
        body = dump(GOOD[path])
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        return rng.choice((
            lambda: post(path, body, kind=rng.choice(("text/plain", "multipart/form-data; boundary=x", "application/xml", ""))),
            lambda: post(path, body, more="Content-Encoding: gzip\r\n"),
            lambda: post(path, body, more="Expect: 100-continue\r\n"),
            lambda: post(path, body, more="Range: bytes=" + "0-," * 2000 + "\r\n"),
            lambda: post(path, body, more="Origin: http://evil.example\r\nCookie: " + "a=b; " * 500 + "\r\n"),
            lambda: post(rng.choice(("/v1/models/" + "x" * 3000, "/%00", "/..%2f..", "//", "/v1/chat/completions/", "/generate;x", "/\\")), body),
            lambda: Request(rng.choice((b"PUT", b"DELETE", b"PATCH", b"TRACE", b"OPTIONS", b"GET")) + head[4:] + length + body),
            lambda: Request(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)),
            lambda: Request(head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", plain=False),
            lambda: Request(head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", plain=False),
            lambda: Request(head + b"X: " + b"a" * 70_000 + b"\r\n" + length + body, plain=False),
            lambda: Request(head + b"X: a\r\n" * 20_000 + length + body, plain=False),
            lambda: Request(head + b"Content-Length: 999999999999\r\n\r\n{", plain=False),
            lambda: Request(head + length + body[:-3], plain=False),
            lambda: Request(head + length, plain=False),
            lambda: Request(head[: rng.randrange(1, len(head))], plain=False),
            lambda: Request(rng.randbytes(rng.choice((1, 100, 5000))), plain=False),
            lambda: Request(b"GET / HTTP/9.9\r\n\r\n", plain=False),
            lambda: Request(head + b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + length + body, plain=False),
            lambda: Request((head + length + body) * 30, plain=False),
            lambda: Request(head + b"A\x00B: x\r\n" + length + body, plain=False),
            lambda: Request(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", plain=False),
        ))()  # fmt: skip


WHATEVER = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def strategy(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type as hypothesis makes them, and a few of others."""
    inspect = msgspec.inspect
    if isinstance(kind, inspect.UnionType):
        return st.one_of([strategy(each) for each in kind.types])
    if isinstance(kind, inspect.IntType):
        return st.integers(-3, 3) | st.integers() | st.sampled_from([2**31, 2**63, -(2**63)])
    if isinstance(kind, inspect.FloatType):
        return st.floats() | st.floats(-3, 3) | st.integers(-3, 3)
    if isinstance(kind, inspect.StrType):
        return st.text(max_size=60)
    if isinstance(kind, inspect.BoolType):
        return st.booleans()
    if isinstance(kind, inspect.NoneType):
        return st.none()
    if isinstance(kind, inspect.LiteralType):
        return st.sampled_from(list(kind.values))
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return st.lists(strategy(kind.item_type), max_size=4)
    if isinstance(kind, inspect.DictType):
        return st.dictionaries(st.text(max_size=8) | st.integers(-2, 600).map(str), strategy(kind.value_type), max_size=4)
    if isinstance(kind, inspect.StructType):
        return st.fixed_dictionaries({}, optional={f.encode_name: strategy(f.type) for f in kind.fields})
    return WHATEVER


def bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of a route: a good one with some fields made anew."""
    fields = {f.encode_name: strategy(info(f)) for f in msgspec.structs.fields(STRUCTS[path])}
    one = st.one_of([st.fixed_dictionaries({name: values}) for name, values in sorted(fields.items())])
    return st.lists(one, min_size=1, max_size=3).map(lambda found: {**GOOD[path], **{k: v for each in found for k, v in each.items()}})


def generate(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` bodies with their routes, from hypothesis."""
    quietly = settings(
        max_examples=count, database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
    )
    found: list[tuple[str, bytes]] = []

    @hypothesis_seed(seed)
    @quietly
    @given(asked=st.one_of([st.tuples(st.just(path), bodies(path)) for path in GOOD]))
    def collect(asked: tuple[str, dict[str, Any]]) -> None:
        found.append((asked[0], json.dumps(asked[1]).encode("utf-8", "replace")))

    collect()
    yield from found
