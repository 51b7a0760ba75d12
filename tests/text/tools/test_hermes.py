"""Calls as Hermes and Qwen write them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from transcripts import (
    FUNCTIONS,
    Sampler,
    Transcript,
    check,
    check_allowed,
    check_any,
    check_grammar,
    check_stays_small,
    read,
    soup,
)

from minivllm.text.reply import Piece
from minivllm.text.tools.hermes import Hermes

PARIS = '{"city": "Paris", "unit": "C"}'


def call(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


HARD = r'{"city": "</tool_call> <tool_call>{\"name\": \"get\"} }]", "unit": "\u00e9\ud83d\ude00\\\"", "days": [-2.5e3, [[]]]}'
EMOJI = '{"city": "Zürich 🇨🇭👩‍🚀", "unit": "摄氏"}'

TRANSCRIPTS = {
    "empty": Transcript(""),
    "plain": Transcript("Hello < world >\n", "Hello < world >\n"),
    "one call": Transcript(call(), "", (("get_weather", PARIS),)),
    "two calls": Transcript(call() + "\n" + call("get", "{}") + "\n", "", (("get_weather", PARIS), ("get", "{}"))),
    "text around": Transcript(
        "  Let me see.\n\n" + call() + "\n\n Done. \n", "  Let me see.Done. \n", (("get_weather", PARIS),)
    ),
    "no whitespace": Transcript(
        '<tool_call>{"name":"get","arguments":{}}</tool_call><tool_call>{"name":"get","arguments":{ }}</tool_call>',
        "",
        (("get", "{}"), ("get", "{ }")),
    ),
    "much whitespace": Transcript(
        '\n <tool_call> \r\n\t{ "name" : "get" ,\n "arguments" : {\n} \n} \n </tool_call> \n', "", (("get", "{\n}"),)
    ),
    "marks and escapes in strings": Transcript(call(arguments=HARD), "", (("get_weather", HARD),)),
    "unicode": Transcript(call(arguments=EMOJI), "", (("get_weather", EMOJI),)),
    "escaped name": Transcript(
        call("m\\u00e9t\\u00e9o-2", "{}") + call("météo-2", "{}"), "", (("météo-2", "{}"), ("météo-2", "{}"))
    ),
    "arguments first": Transcript(
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', "", (("get_weather", PARIS),)
    ),
    "llama's word, more members": Transcript(
        '<tool_call>{"id": [1], "name": "get", "parameters": {"a": 1}, "b": "x"}</tool_call>', "", (("get", '{"a": 1}'),)
    ),
    "no arguments": Transcript('<tool_call>{"name": "get"}</tool_call>', "", (("get", "{}"),)),
    "broken JSON, then a call": Transcript(
        'Now: <tool_call>\n{"name": "get", "arguments": {"a": 1]}}\n</tool_call>\n' + call(),
        'Now: <tool_call>\n{"name": "get", "arguments": {"a": 1]}}\n</tool_call>',
        (("get_weather", PARIS),),
    ),
    "a call cut off by the next": Transcript(
        '<tool_call>\n{"name": "get", "arguments": {"a": ' + call(),
        '<tool_call>\n{"name": "get", "arguments": {"a":',
        (("get_weather", PARIS),),
    ),
    "an end that is a beginning": Transcript(
        '<tool_call>{"name": "get", "arguments": {}}' + call(),
        '<tool_call>{"name": "get", "arguments": {}}',
        (("get_weather", PARIS),),
    ),
    "not a number": Transcript(call(arguments='{"a": NaN}'), call(arguments='{"a": NaN}')),
    "bare line break in a string": Transcript(call(arguments='{"a": "x\ny"}'), call(arguments='{"a": "x\ny"}')),
    "one bracket too many": Transcript(call(arguments="{}}"), call(arguments="{}}")),
    "cut off in the arguments": Transcript(call()[:-20], call()[:-20]),
    "cut off in the end mark": Transcript("Hi " + call()[:-1] + " ", "Hi " + call()[:-1] + " "),
    "cut off in the begin mark": Transcript("Hi <tool_cal", "Hi <tool_cal"),
    "unknown function": Transcript(call("got") + "\n" + call("get", "{}"), call("got"), (("get", "{}"),)),
    "unknown function, name last": Transcript(
        '<tool_call>{"arguments": {}, "name": "got"}</tool_call>', '<tool_call>{"arguments": {}, "name": "got"}</tool_call>'
    ),
    "no name": Transcript('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>'),
    "arguments are a list": Transcript(call("get", "[1]") + "!", call("get", "[1]") + "!"),
    "arguments are a string": Transcript(call("get", r'"{\"a\": 1}"'), call("get", r'"{\"a\": 1}"')),
    "two names": Transcript(
        '<tool_call>{"name": "get", "name": "get", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get", "name": "get", "arguments": {}}</tool_call>',
    ),
    "arguments twice": Transcript(
        '<tool_call>{"name": "get", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": "get", "arguments": {}, "parameters": {}}</tool_call>',
    ),
    "empty object": Transcript("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
    "nothing inside": Transcript("<tool_call></tool_call> ", "<tool_call></tool_call> "),
    "very deep": Transcript(call("get", '{"a": ' + "[" * 400), call("get", '{"a": ' + "[" * 400)),
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(name: str) -> None:
    check(Hermes, TRANSCRIPTS[name])


def test_arguments_are_passed_on_while_they_come() -> None:
    parser = Hermes(FUNCTIONS)
    assert parser.feed('Hi \n<tool_call>\n{"name": "get_we') == [Piece("content", "Hi")]
    assert parser.feed('ather", "arguments": ') == []
    assert parser.feed('{"ci') == [Piece("call", "get_weather", 0), Piece("arguments", '{"ci', 0)]
    assert parser.feed('ty": "') == [Piece("arguments", 'ty": "', 0)]
    assert parser.feed('P"} ') == [Piece("arguments", 'P"}', 0)]
    assert parser.feed("}\n</tool_cal") == []
    assert parser.feed('l>\n<tool_call>{"name": "get", "arguments": {"a"') == [
        Piece("call", "get", 1),
        Piece("arguments", '{"a"', 1),
    ]
    assert parser.finish() == [Piece("void", call=1), Piece("content", '<tool_call>{"name": "get", "arguments": {"a"')]


def test_no_more_than_a_mark_is_held_back() -> None:
    parser = Hermes(FUNCTIONS)
    assert parser.feed("a < b") == [Piece("content", "a < b")]
    assert parser.feed(" c <tool_") == [Piece("content", " c")]
    assert parser.feed("box>") == [Piece("content", " <tool_box>")]
    assert parser.feed('<tool_call>{"name": "got"') == [Piece("content", '<tool_call>{"name": "got"')]
    assert parser.feed(', "arguments": {"a') == [Piece("content", ', "arguments": {"a')]


def test_the_number_of_a_voided_call_is_not_used_again() -> None:
    pieces = read(Hermes, [call("get", '{"a": x}') + call()])
    assert [(p.kind, p.call) for p in pieces if p.kind in ("call", "void")] == [("call", 0), ("void", 0), ("call", 1)]


@settings(max_examples=200, deadline=None)
@given(soup(Hermes, [call(), call("get", "{}"), call(arguments=HARD), call("got")]))
def test_any_text(text: str) -> None:
    check_any(Hermes, text)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "a" + " \n" * 50_000 + "b",
        call() + "\n" * 100_000 + call(),
        "<tool_call" * 10_000,
        "<tool_call>" * 10_000,
        call(arguments='{"a": "' + "long " * 20_000 + '"}'),
        call(arguments='{"a": "' + "long " * 20_000),
        '<tool_call>{"arguments": {"a": "' + "long " * 20_000 + '"}, "name": "get"}</tool_call>',
        '<tool_call>{"name": "' + "long " * 20_000,
        call(arguments='{"a": [' + "{}, " * 25_000 + "0]}"),
    ],
    ids=lambda text: text[:12],
)
def test_a_long_text_costs_its_length(text: str) -> None:
    check_stays_small(Hermes, text)


def test_what_the_grammar_allows_is_calls(bundled_model: Path) -> None:
    check_grammar(Hermes, Sampler(bundled_model))


def test_the_grammar_allows_what_templates_write(bundled_model: Path) -> None:
    one = [call(), call("météo-2", "{}")]
    several = [call() + "\n" + call("get", "{}")]
    no = ["", "Hi", call("got"), call("get_weather", "{}"), call() + "\n", call() + call(), call("get", '{"a": 1}')]
    check_allowed(Hermes, Sampler(bundled_model), one, several, no)


def test_the_grammar_takes_marks_as_it_is_told() -> None:
    source = Hermes.grammar(FUNCTIONS[1:2], False, {"<tool_call>": "<tool_call>", "</tool_call>": "<[7]>"}.__getitem__)
    assert 'call: <tool_call> "\\n" body "\\n" <[7]>' in source
    assert json.dumps("<tool_call>") not in source
