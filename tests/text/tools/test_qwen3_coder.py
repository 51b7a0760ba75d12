"""Calls of Qwen3-Coder: what is one, what its values mean, and that no cut of the text shows."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_points import Sampler, calls_of, read, read_anyhow, read_everywhere

from minivllm.text.reply import Function, Reply
from minivllm.text.tools.held import json_text
from minivllm.text.tools.qwen3_coder import Qwen3Coder
from minivllm.text.tools.qwen3_xml import Qwen3Xml

FUNCTIONS = (
    Function("now"),
    Function(
        "put",
        {
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "i": {"type": "integer"},
                "b": {"type": "boolean"},
                "o": {"type": "object"},
                "a": {"type": "array"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "number"}]},
                "unit": {"enum": ["C", "F"]},
                "not": {"type": "null"},
            },
        },
    ),
)


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def call(name: str, *parameters: str) -> str:
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def coder() -> Qwen3Coder:
    return Qwen3Coder(FUNCTIONS)


def lenient() -> Qwen3Coder:
    return Qwen3Xml(FUNCTIONS)


BOTH = pytest.mark.parametrize("make", [coder, lenient])
NOW = call("now")
BROKEN = "<tool_call>\n<function=put>\n<parameter=s>\nx\n</parameter>\noops</function>\n</tool_call>"

# text, content, calls: read alike by both parsers
GOOD = {
    "empty": ("", "", []),
    "text": ("Just < text, with </parameter> in it.\n", "Just < text, with </parameter> in it.\n", []),
    "no parameters": (NOW, "", [("now", "{}")]),
    "text before": (f"I'll look.\n\n{NOW}", "I'll look.", [("now", "{}")]),
    "text around": (f"A \n{NOW}\n\nB\n", "A\n\nB\n", [("now", "{}")]),
    "two calls": (f"{NOW}\n{call('put', parameter('i', '3'))}\n", "", [("now", "{}"), ("put", '{"i": 3}')]),
    "several values": (
        call("put", parameter("s", "Berlin"), parameter("i", "-3"), parameter("b", "true"), parameter("unit", "C")),
        "",
        [("put", '{"s": "Berlin", "i": -3, "b": true, "unit": "C"}')],
    ),
    "nested JSON": (
        call("put", parameter("o", '{"x": [1, {"y": null}]}'), parameter("a", '[\n  "ä"\n]')),
        "",
        [("put", '{"o": {"x": [1, {"y": null}]}, "a": [\n  "ä"\n]}')],
    ),
    "Unicode": (f"Grüße 👍🏽 {call('put', parameter('s', '東京 🎉'))}", "Grüße 👍🏽", [("put", '{"s": "東京 🎉"}')]),
    "quotes": (call("put", parameter("s", 'say "hi" \\n \\')), "", [("put", '{"s": "say \\"hi\\" \\\\n \\\\"}')]),
    "marks in a value": (
        call("put", parameter("s", "a <tool_call> <function=now> </tool_call></function></para </parameter")),
        "",
        [("put", '{"s": "a <tool_call> <function=now> </tool_call></function></para </parameter"}')],
    ),
    "newlines of a value": (call("put", parameter("s", "\n x \n")), "", [("put", '{"s": "\\n x \\n"}')]),
    "an empty value": (call("put", parameter("s", "")), "", [("put", '{"s": ""}')]),
    "a string that looks like a number": (call("put", parameter("s", "007")), "", [("put", '{"s": "007"}')]),
    "a number that is none": (call("put", parameter("i", "many")), "", [("put", '{"i": "many"}')]),
    "no JSON": (
        call("put", parameter("i", "NaN"), parameter("o", "{'x': 1}")),
        "",
        [("put", '{"i": "NaN", "o": "{\'x\': 1}"}')],
    ),
    "Python's words": (
        call("put", parameter("b", "False"), parameter("not", "None")),
        "",
        [("put", '{"b": false, "not": null}')],
    ),
    "one of several types": (
        call("put", parameter("maybe", "null"), parameter("maybe", "1.5"), parameter("maybe", '"x"')),
        "",
        [("put", '{"maybe": null, "maybe": 1.5, "maybe": "\\"x\\""}')],
    ),
    "a parameter without schema": (
        call("put", parameter("n", "3"), parameter("t", "three"), parameter("q", '"3"')),
        "",
        [("put", '{"n": 3, "t": "three", "q": "3"}')],
    ),
    "no whitespace": (
        "<tool_call><function=put><parameter=s>x</parameter><parameter=i>3</parameter></function></tool_call>",
        "",
        [("put", '{"s": "x", "i": 3}')],
    ),
    "unknown function": (f"{call('rm', parameter('s', 'x'))}\n{NOW}", call("rm", parameter("s", "x")), [("now", "{}")]),
    "beginning of a name": ("<tool_call>\n<function=no>\n", "<tool_call>\n<function=no>\n", []),
    "text in a call": (f"{BROKEN}\n{NOW}", BROKEN, [("now", "{}")]),
    "mark twice": (f"<tool_call>\n{NOW}", "<tool_call>", [("now", "{}")]),
    "a key without end": ("<tool_call>\n<function=put>\n<parameter=s\nx", "<tool_call>\n<function=put>\n<parameter=s\nx", []),
    "cut in a value": (f"A\n{BROKEN[:45]}\n</p", f"A\n{BROKEN[:45]}\n</p", []),
    "cut in a mark": (f"{NOW}\n<tool_", "\n<tool_", [("now", "{}")]),
}  # fmt: skip

# text, content and calls of the strict parser, content and calls of the lenient one
PUT = [("put", '{"s": "x"}')]
DIFFERENT = {
    "no wrapper": ("Hm. <function=put>\n<parameter=s>\nx\n</parameter>\n</function> ok", None, [], "Hm. ok", PUT),
    "half a wrapper": ("<function=put><parameter=s>x</parameter></function></tool_call>", None, [], "", PUT),
    "cut before the last mark": (call("put", parameter("s", "x"))[:-12], None, [], "", PUT),
    "two in one": (
        "<tool_call>\n<function=now>\n</function>\n<function=put>\n<parameter=s>\nx\n</parameter>\n</function>\n</tool_call>",
        None, [], "", [("now", "{}"), *PUT],
    ),
    "a value without end": (
        "<tool_call>\n<function=put>\n<parameter=s>\nx\n<parameter=i>\n3\n</function>\n</tool_call>", None, [], "",
        [("put", '{"s": "x", "i": 3}')],
    ),
    "a function without end": ("<tool_call>\n<function=put>\n<parameter=s>\nx\n</parameter>\n</tool_call>", None, [], "", PUT),
    "a call after a broken one": (
        f"<tool_call>\n<function=put>\n<parameter=s>\nx\n</parameter>\n{NOW}",
        "<tool_call>\n<function=put>\n<parameter=s>\nx\n</parameter>", [("now", "{}")],
        "<tool_call>\n<function=put>\n<parameter=s>\nx\n</parameter>", [("now", "{}")],
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", GOOD)
def test_a_transcript(make, case: str) -> None:
    text, content, calls = GOOD[case]
    reply = read_everywhere(make, text)
    assert (reply.content, calls_of(reply), reply.reasoning) == (content, calls, "")
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_only_the_lenient_parser_takes(case: str) -> None:
    text, content, calls, lenient_content, lenient_calls = DIFFERENT[case]
    reply = read_everywhere(coder, text)
    assert (reply.content, calls_of(reply)) == (text if content is None else content, calls)
    reply = read_everywhere(lenient, text)
    assert (reply.content, calls_of(reply)) == (lenient_content, lenient_calls)


def test_a_string_streams_and_only_a_mark_is_held_back() -> None:
    parser = coder()
    parser.feed("<tool_call>\n<function=put>\n<parameter=s>\n")
    assert [p.text for p in parser.feed("one two\n</para")] == ["one two"]
    assert [p.text for p in parser.feed("graph")] == ["\\n</paragraph"]


def test_a_call_is_announced_with_its_first_parameter() -> None:
    parser = coder()
    assert parser.feed("<tool_call>\n<function=put>\n<parameter") == []
    assert [(p.kind, p.text) for p in parser.feed("=")] == [("call", "put"), ("arguments", "{")]


def test_the_number_of_a_void_call_is_not_used_again() -> None:
    assert list(read(coder(), [f"{BROKEN}\n{NOW}"]).calls) == [1]


def test_a_value_nested_too_deeply_is_a_string() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    reply = read(coder(), [call("put", parameter("a", deep))])
    assert json.loads(reply.calls[0].arguments) == {"a": deep}
    reply = read(coder(), [call("put", parameter("a", "[" * 129 + "]" * 129), parameter("a", "[" * 128 + "]" * 128))])
    assert isinstance(json.loads(reply.calls[0].arguments)["a"], list)
    assert reply.calls[0].arguments.startswith('{"a": "[')


def test_strange_schemas_are_read_as_no_schema() -> None:
    nested: dict = {"type": "integer"}
    for _ in range(5000):
        nested = {"anyOf": [nested]}
    properties = (3, {"s": True}, {"s": {"type": 7, "enum": 2}}, {"s": {"anyOf": 1}}, {"s": nested})
    for schema in ({"properties": p} for p in properties):
        reply = read(Qwen3Coder((Function("put", schema),)), [call("put", parameter("s", "3"))])
        assert calls_of(reply) == [("put", '{"s": 3}')]


TAGS = ["<function=put>", "<function=now>", "<parameter=s>", "<parameter=i>"]
soup = st.lists(st.sampled_from([*Qwen3Coder.MARKS, *TAGS, *'\nx><1"é🎉']), max_size=25).map("".join)


def check_reply(reply: Reply, text: str) -> None:
    for name, arguments in calls_of(reply):
        assert name in ("put", "now")
        assert isinstance(json.loads(arguments), dict)
    if not reply.calls:
        assert reply.content == text


@BOTH
@settings(max_examples=300, deadline=None)
@given(text=soup, cuts=st.lists(st.integers(0, 200), max_size=4))
def test_mark_soup_reads_the_same_however_it_is_cut(make, text: str, cuts: list[int]) -> None:
    check_reply(read_anyhow(make, text, cuts), text)


@BOTH
@pytest.mark.parametrize("unit", ["x", " ", "<", "<tool_call>\n", "\n</parameter", "<function=put>\n<parameter=s>\n"])
def test_a_long_text_by_characters(make, unit: str) -> None:
    text = unit * (100_000 // len(unit))
    check_reply(read(make(), text), text)
    text = f"<tool_call>\n<function=put>\n<parameter=s>\n{text}"
    assert read(coder(), text) == Reply(content=text)


# ---------------------------------------------------------------------------------------------------------------- grammars

SAMPLED = (
    Function("now", {"type": "object", "properties": {}}),
    Function(
        "put",
        {
            "type": "object",
            "properties": {
                "s": {"type": "string", "minLength": 1, "maxLength": 12},
                "i": {"type": "integer", "minimum": -5, "maximum": 99},
                "unit": {"enum": ["C", "F", 3, None]},
                "o": {"$ref": "#/$defs/Point"},
                "maybe": {"type": ["boolean", "null"]},
                "either": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
            },
            "required": ["s", "o"],
            "$defs": {
                "Point": {
                    "type": "object",
                    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"type": "boolean"}},
                    "required": ["y"],
                    "additionalProperties": False,
                }
            },
        },
    ),
)


@BOTH
@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_grammar_allows_is_read_as_calls(make, parallel: bool, sampler: Sampler) -> None:
    source = type(make()).grammar(SAMPLED, parallel, json_text)
    texts = [sampler.draw(source, random.Random(seed).choice) for seed in range(40)]
    found: list[str] = []
    most = 0
    for text in filter(None, texts):
        reply = read(type(make())(SAMPLED), [text])
        assert reply.content == "" and reply.calls, text
        most = max(most, len(reply.calls))
        for name, arguments in calls_of(reply):
            values = json.loads(arguments)
            found.append(name)
            assert name == "now" or {"s", "o"} <= values.keys() <= {"s", "i", "unit", "o", "maybe", "either"}
            assert name == "now" or (1 <= len(values["s"]) <= 12 and isinstance(values["o"]["y"], bool))
    assert {"now", "put"} == set(found)
    assert (most > 1) is parallel


def test_the_grammar_lets_a_string_hold_marks(sampler: Sampler) -> None:
    source = Qwen3Coder.grammar((Function("put", {"properties": {"s": {"type": "string"}}}),), False, json_text)
    assert sampler.allows(source, call("put", parameter("s", "if a < b:\n  <tool_call> </para> </function>\n")))
    assert not sampler.allows(source, call("put", parameter("s", "</parameter> x")))


def test_the_grammar_of_a_function_without_schema_takes_any_parameters(sampler: Sampler) -> None:
    source = Qwen3Coder.grammar((Function("now"),), False, json_text)
    assert sampler.allows(source, call("now", parameter("a", "1"), parameter("b_2", "x <y> z")))
    assert not sampler.allows(source, f"{NOW}\n{NOW}")
