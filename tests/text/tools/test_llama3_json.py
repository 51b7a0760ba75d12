"""Calls as Llama 3 writes them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from transcripts import FUNCTIONS, Sampler, Transcript, check, check_allowed, check_any, check_grammar, check_stays_small, soup

from minivllm.text.reply import Piece
from minivllm.text.tools.llama3_json import Llama3Json

PARIS = '{"city": "Paris", "unit": "C"}'
HARD = r'{"city": "; {\"name\": \"get\"} <|python_tag|>", "unit": "\u00e9\ud83d\ude00\\", "days": [[{"a": {}}], true]}'
EMOJI = '{"city": "東京🗼", "unit": "\\\\ é"}'
TAG = "<|python_tag|>"


def call(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


TRANSCRIPTS = {
    "empty": Transcript(""),
    "whitespace": Transcript(" \n ", " \n "),
    "plain": Transcript(" It is {sunny}; " + call() + TAG, " It is {sunny}; " + call() + TAG),
    "one call": Transcript(call(), "", (("get_weather", PARIS),)),
    "whitespace around": Transcript("\n\n " + call() + " \n", "", (("get_weather", PARIS),)),
    "tag": Transcript(TAG + call(), "", (("get_weather", PARIS),)),
    "tag and whitespace": Transcript(" " + TAG + "\n" + call() + "\n", "", (("get_weather", PARIS),)),
    "the other word": Transcript('{"name": "get", "arguments": {}}', "", (("get", "{}"),)),
    "type first, arguments before the name": Transcript(
        '{"type": "function", "parameters": {"a": {}}, "name": "get"}', "", (("get", '{"a": {}}'),)
    ),
    "no arguments": Transcript('{"name": "get"}', "", (("get", "{}"),)),
    "several": Transcript(
        call() + "; " + call("get", "{}") + ";\n" + TAG + call("météo-2", "{}"),
        "",
        (("get_weather", PARIS), ("get", "{}"), ("météo-2", "{}")),
    ),
    "a separator behind the last": Transcript(call() + " ; ", "", (("get_weather", PARIS),)),
    "marks and escapes in strings": Transcript(
        call(arguments=HARD) + ";" + call("get", "{}"), "", (("get_weather", HARD), ("get", "{}"))
    ),
    "unicode": Transcript(call(arguments=EMOJI), "", (("get_weather", EMOJI),)),
    "text behind": Transcript(call() + "\nThat is all; bye. ", "That is all; bye. ", (("get_weather", PARIS),)),
    "calls without a separator": Transcript(call("get", "{}") + "\n" + call(), call(), (("get", "{}"),)),
    "some other JSON": Transcript('{"answer": {"name": "get"}, "b": [1]}', '{"answer": {"name": "get"}, "b": [1]}'),
    "a person": Transcript('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}'),
    "a call in the string of other JSON": Transcript(
        r'{"a": "; {\"name\": \"get\", \"parameters\": {}}"}', r'{"a": "; {\"name\": \"get\", \"parameters\": {}}"}'
    ),
    "built-in of the tag": Transcript(TAG + 'brave_search.call(query="a")', TAG + 'brave_search.call(query="a")'),
    "broken JSON, then a call": Transcript(
        call("get", '{"a": tru}') + "; " + call(), call("get", '{"a": tru}'), (("get_weather", PARIS),)
    ),
    "broken second": Transcript(
        call() + "; " + call("get", '{"a" 1}') + ' ; {"name"', call("get", '{"a" 1}') + ' ; {"name"', (("get_weather", PARIS),)
    ),
    "unknown function, then a call": Transcript(
        call("got", HARD) + ";" + call("get", "{}"), call("got", HARD), (("get", "{}"),)
    ),
    "arguments are a list": Transcript(call("get", "[{}]"), call("get", "[{}]")),
    "arguments are null": Transcript(call("get", "null"), call("get", "null")),
    "name is no string": Transcript(
        '{"name": {"name": "get"}, "parameters": {}}', '{"name": {"name": "get"}, "parameters": {}}'
    ),
    "cut off in the name": Transcript('{"name": "get_wea', '{"name": "get_wea'),
    "cut off in the arguments": Transcript(call()[:-8] + " ", call()[:-8] + " "),
    "cut off before the last bracket": Transcript(" " + call()[:-1], " " + call()[:-1]),
    "cut off in the tag": Transcript(" <|python_", " <|python_"),
    "only a tag": Transcript(TAG + " ", TAG + " "),
    "only a bracket": Transcript("{", "{"),
    "a list": Transcript("[" + call() + "]", "[" + call() + "]"),
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(name: str) -> None:
    check(Llama3Json, TRANSCRIPTS[name])


def test_arguments_are_passed_on_while_they_come() -> None:
    parser = Llama3Json(FUNCTIONS)
    assert parser.feed('\n{"name": "get", ') == []
    assert parser.feed('"parameters": {"a": ') == [Piece("call", "get", 0), Piece("arguments", '{"a": ', 0)]
    assert parser.feed("1}") == [Piece("arguments", "1}", 0)]
    assert parser.feed("x") == [Piece("void", call=0), Piece("content", '\n{"name": "get", "parameters": {"a": 1}x')]
    assert parser.finish() == []


def test_other_json_is_not_held_back() -> None:
    parser = Llama3Json(FUNCTIONS)
    assert parser.feed('{"answ') == []
    assert parser.feed('er": ') == [Piece("content", '{"answer":')]
    assert parser.feed('"long') == [Piece("content", ' "long')]


def test_plain_text_is_not_held_back() -> None:
    parser = Llama3Json(FUNCTIONS)
    assert parser.feed("<|py") == []
    assert parser.feed("re") == [Piece("content", "<|pyre")]
    assert parser.feed("; <|python_tag|>{") == [Piece("content", "; <|python_tag|>{")]


@settings(max_examples=200, deadline=None)
@given(soup(Llama3Json, [call(), call("get", "{}"), call(arguments=HARD) + ";", call("got"), call("get", "{}") + "; "]))
def test_any_text(text: str) -> None:
    check_any(Llama3Json, text)


@pytest.mark.parametrize(
    "text",
    [
        "word; " * 20_000,
        "{" * 100_000,
        call() + ";{" * 50_000,
        call("get", "{};") * 3_000,
        (call("get", "{}") + ";\n") * 3_000,
        call("get", '{"a": "' + "long; " * 20_000 + '"}'),
        '{"a": "' + "long; " * 20_000 + '"}',
        " " * 100_000 + call(),
        (TAG + " ; ") * 5_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_long_text_costs_its_length(text: str) -> None:
    check_stays_small(Llama3Json, text)


def test_what_the_grammar_allows_is_calls(bundled_model: Path) -> None:
    check_grammar(Llama3Json, Sampler(bundled_model))


def test_the_grammar_allows_what_templates_write(bundled_model: Path) -> None:
    one = [call(), call("météo-2", "{}")]
    several = [call() + "; " + call("get", "{}")]
    no = ["", "Hi", call("got"), call("get_weather", "{}"), call() + ";", call("get", '{"a": 1}')]
    check_allowed(Llama3Json, Sampler(bundled_model), one, several, no)
