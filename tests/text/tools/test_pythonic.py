"""Calls as Python expressions: which literals are read, what JSON they become, and that no cut of the text shows."""

import ast
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_points import Sampler, calls_of, read, read_anyhow, read_everywhere

from minivllm.text.reply import Function, Reply
from minivllm.text.tools.held import json_text
from minivllm.text.tools.pythonic import Pythonic


def pythonic() -> Pythonic:
    return Pythonic((Function("f"), Function("find"), Function("web.get-page")))


# text, content, calls
TRANSCRIPTS = {
    "empty": ("", "", []),
    "text": ("The list [1, 2] is short.\n", "The list [1, 2] is short.\n", []),
    "no arguments": ("[f()]", "", [("f", "{}")]),
    "several calls": (
        '[find(q="x", n=3), f(), web.get-page(url=\'u\')]',
        "",
        [("find", '{"q": "x", "n": 3}'), ("f", "{}"), ("web.get-page", '{"url": "u"}')],
    ),
    "whitespace": (' \n[ f( a = 1 ,\n b = 2 , ) ,\tf( ) , ] \n', "", [("f", '{"a": 1, "b": 2}'), ("f", "{}")]),
    "special tokens": ("<|python_start|>[f(a=1)]<|python_end|>\n", "", [("f", '{"a": 1}')]),
    "text behind": ("[f(a=1)]\n\nDone. [f(a=2)]", "\n\nDone. [f(a=2)]", [("f", '{"a": 1}')]),
    "half a special token behind": ("[f()]<|python_e", "<|python_e", [("f", "{}")]),
    "nested": (
        '[f(o={"a": [1, [], {}], \'b\': {"c": None,},}, l=[True, False,])]',
        "",
        [("f", '{"o": {"a": [1, [], {}], "b": {"c": null}}, "l": [true, false]}')],
    ),
    "JSON's words": ("[f(a=true, b=null, c=false)]", "", [("f", '{"a": true, "b": null, "c": false}')]),
    "numbers": (
        "[f(a=-1, b=+2, c=1.50, d=.5, e=-3., g=1e3, h=1_000, i=12345678901234567890, j=007)]",
        "",
        [("f", '{"a": -1, "b": 2, "c": 1.50, "d": 0.5, "e": -3.0, "g": 1e3, "h": 1000, "i": 12345678901234567890, "j": 7}')],
    ),
    "quotes": ("""[f(a='say "hi"', b="it's", c='it\\'s', d="\\"")]""", "", [
        ("f", '{"a": "say \\"hi\\"", "b": "it\'s", "c": "it\'s", "d": "\\""}')
    ]),
    "brackets in a string": ('[f(a="), f(a=1)] [", b="x")]', "", [("f", '{"a": "), f(a=1)] [", "b": "x"}')]),
    "escapes": (r"[f(a='\n\t\\\x41\u00e9\U0001f600\101\0\q\N{DOT}')]", "", [
        ("f", r'{"a": "\n\t\\Aé😀A\u0000\\q\\N{DOT}"}')
    ]),
    "surrogates": (r'[f(a="\ud83d\ude00", b="\ud800")]', "", [("f", r'{"a": "\ud83d\ude00", "b": "\ud800"}')]),
    "line breaks": ('[f(a="1\n2\\\n3")]', "", [("f", '{"a": "1\\n23"}')]),
    "Unicode": ('[f(größe="東京 🎉👍🏽")]', "", [("f", '{"größe": "東京 🎉👍🏽"}')]),
    "twice": ("[f(a=1, a=2)]", "", [("f", '{"a": 1, "a": 2}')]),
    "text before": ("Sure: [f(a=1)]", "Sure: [f(a=1)]", []),
    "unknown function": ("[g(a=1), f(a=1)]", "[g(a=1), f(a=1)]", []),
    "a longer name": ("[fi(a=1)]", "[fi(a=1)]", []),
    "unknown function behind": ("[f(a=1), g(a=1)] ", ", g(a=1)] ", [("f", '{"a": 1}')]),
    "no list": ("f(a=1)", "f(a=1)", []),
    "an empty list": ("[]", "[]", []),
    "positional": ("[f(1)]", "[f(1)]", []),
    "a call as a value": ("[f(a=f())]", "[f(a=f())]", []),
    "an expression": ("[f(a=1+1)]", "[f(a=1+1)]", []),
    "a tuple": ("[f(a=(1, 2))]", "[f(a=(1, 2))]", []),
    "a key that is no string": ("[f(a={1: 2})]", "[f(a={1: 2})]", []),
    "no such code point": (r"[f(a='\Uffffffff')]", r"[f(a='\Uffffffff')]", []),
    "a number beyond floats": ("[f(a=1_0e999)]", "[f(a=1_0e999)]", []),
    "cut in a string": ('[f(a="x', '[f(a="x', []),
    "cut in a name": ("[fin", "[fin", []),
    "cut in the second call": ("[f(a=1), find(q=[1, ", ", find(q=[1, ", [("f", '{"a": 1}')]),
    "cut behind a call": ("[f(a=1)", "", [("f", '{"a": 1}')]),
    "broken in the second call": ("[f(), f(a=1, b=), f()]", ", f(a=1, b=), f()]", [("f", "{}")]),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_a_transcript(case: str) -> None:
    text, content, calls = TRANSCRIPTS[case]
    reply = read_everywhere(pythonic, text)
    assert (reply.content, calls_of(reply), reply.reasoning) == (content, calls, "")
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


def test_arguments_come_while_they_are_read() -> None:
    parser = pythonic()
    assert parser.feed("[f(a") == []
    assert [(p.kind, p.text) for p in parser.feed("=")] == [("call", "f"), ("arguments", '{"a": ')]
    assert [p.text for p in parser.feed("'one two\\")] == ['"one two']
    assert [p.text for p in parser.feed("n', b=1")] == ['\\n", "b": ']
    assert [p.text for p in parser.feed("2)")] == ["12}"]


def test_a_plain_text_is_not_held_back() -> None:
    parser = pythonic()
    assert [p.text for p in parser.feed(" Hello")] == [" Hello"]
    assert [p.text for p in parser.feed(" [f(")] == [" [f("]


def test_what_nests_too_deeply_is_no_call() -> None:
    def text(depth: int) -> str:
        return f"[f(a={'[' * depth}{']' * depth})]"

    assert len(read(pythonic(), [text(128)]).calls) == 1
    assert read(pythonic(), [text(129)]) == Reply(content=text(129))
    assert read(pythonic(), text(50_000)) == Reply(content=text(50_000))


literal = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=literal, cuts=st.lists(st.integers(0, 300), max_size=3))
def test_what_python_writes_is_read_as_python_reads_it(value: object, cuts: list[int]) -> None:
    reply = read_anyhow(pythonic, f"[f(a={value!r})]", cuts)
    assert reply.content == ""
    assert json.loads(reply.calls[0].arguments) == {"a": value}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # Python's, of unknown escapes
@settings(max_examples=300, deadline=None)
@given(inside=st.text(alphabet="ab\\01789abfnrtvxuUN'é\n/{}", max_size=12))
def test_a_string_is_what_python_says_or_no_string_to_python(inside: str) -> None:
    text = f'"{inside}"'
    try:
        expected = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        expected = None
    reply = read(pythonic(), [f"[f(a={text})]"])
    if expected is not None:
        assert json.loads(reply.calls[0].arguments) == {"a": expected}
    for call in reply.calls.values():
        assert isinstance(json.loads(call.arguments)["a"], str)


PARTS = [*"[](){},:='\"\\ \nx1-.e🎉", "f(", "find(", "a=", "True", "\\u", "\\x4", "<|python_start|>", "<|python_end|>", "[f(a="]


@settings(max_examples=500, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS), max_size=25).map("".join), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_soup_reads_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    reply = read_anyhow(pythonic, text, cuts)
    for name, arguments in calls_of(reply):
        assert name in ("f", "find")
        assert isinstance(json.loads(arguments), dict)
    if not reply.calls:
        assert reply.content == text


@pytest.mark.parametrize("begin", ["", "[f(", "[f(a=", "[f(a='", "[f(a='\\", "[f(a=["])
@pytest.mark.parametrize("unit", ["x", " ", "1", "[", "1,", "{'a':"])
def test_a_long_text_by_characters(begin: str, unit: str) -> None:
    text = begin + unit * (100_000 // len(unit))
    assert read(pythonic(), text) == Reply(content=text)


# ---------------------------------------------------------------------------------------------------------------- grammars

FUNCTIONS = (
    Function("now", {"type": "object", "properties": {}}),
    Function(
        "put",
        {
            "type": "object",
            "properties": {
                "b": {"type": "boolean"},
                "s": {"type": "string", "minLength": 1, "maxLength": 12},
                "i": {"type": "integer", "minimum": -5, "maximum": 99},
                "unit": {"enum": ["C", "F", 3, None, True]},
                "o": {"$ref": "#/$defs/Point"},
                "maybe": {"type": ["boolean", "null"]},
            },
            "required": ["s", "o"],
            "$defs": {
                "Point": {
                    "type": "object",
                    "properties": {"x": {"type": "string", "maxLength": 6}, "y": {"type": "boolean"}},
                    "required": ["y"],
                    "additionalProperties": False,
                }
            },
        },
    ),
)


@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_grammar_allows_is_read_as_calls(parallel: bool, sampler: Sampler) -> None:
    source = Pythonic.grammar(FUNCTIONS, parallel, json_text)
    texts = [sampler.draw(source, random.Random(seed).choice) for seed in range(40)]
    found: list[str] = []
    most = 0
    for text in filter(None, texts):
        reply = read(Pythonic(FUNCTIONS), [text])
        assert reply.content == "" and reply.calls, text
        most = max(most, len(reply.calls))
        for name, arguments in calls_of(reply):
            values = json.loads(arguments)
            found.append(name)
            assert name == "now" or {"s", "o"} <= values.keys() <= {"b", "s", "i", "unit", "o", "maybe"}
            assert name == "now" or (1 <= len(values["s"]) <= 12 and isinstance(values["o"]["y"], bool))
    assert {"now", "put"} == set(found)
    assert (most > 1) is parallel


def test_which_texts_the_grammar_allows(sampler: Sampler) -> None:
    source = Pythonic.grammar(FUNCTIONS, True, json_text)
    point = 'o={"y":true}'
    for text in (f'[put(s="x", {point})]', f'[now(), put(b=True, s="x", unit=None, {point}, maybe=False), now()]'):
        assert sampler.allows(source, text)
        assert len(read(Pythonic(FUNCTIONS), [text]).calls) == text.count("(")
    for text in ("[]", "[put()]", '[put(s="x")]', f'[put({point}, s="x")]', f'[put(s="x" {point})]', "[now(),]", "[now(), ]"):
        assert not sampler.allows(source, text)
    assert not sampler.allows(Pythonic.grammar(FUNCTIONS, False, json_text), "[now(), now()]")


def test_the_grammar_of_a_function_without_schema_takes_any_arguments(sampler: Sampler) -> None:
    source = Pythonic.grammar((Function("f"),), False, json_text)
    assert sampler.allows(source, '[f(a=1, b_2={"x":[null]})]')
    assert sampler.allows(source, "[f()]")
    assert not sampler.allows(source, "[f(1)]")
