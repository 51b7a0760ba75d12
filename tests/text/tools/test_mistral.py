"""Calls as Mistral's models write them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from transcripts import FUNCTIONS, Sampler, Transcript, check, check_allowed, check_any, check_grammar, check_stays_small, soup

from minivllm.text.reply import Piece
from minivllm.text.tools.mistral import Mistral

MARK = "[TOOL_CALLS]"
PARIS = '{"city": "Paris", "unit": "C"}'
HARD = r'{"city": "[TOOL_CALLS]get[ARGS]{} ]}, {\"name\"", "unit": "\u00e9\ud83d\ude00\\\"", "days": [[], {"a": {"b": [1]}}]}'
EMOJI = '{"city": "Αθήνα 🏛️", "unit": "°C"}'


def item(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def named(name: str = "get_weather", arguments: str = PARIS, call_id: str = "") -> str:
    return f"{MARK}{name}{call_id and '[CALL_ID]' + call_id}[ARGS]{arguments}"


LISTED = MARK + "[" + item() + "]"

TRANSCRIPTS = {
    "empty": Transcript(""),
    "plain": Transcript("A list: [1, 2][TOOL] \n", "A list: [1, 2][TOOL] \n"),
    "list of one": Transcript(LISTED, "", (("get_weather", PARIS),)),
    "list of several": Transcript(
        f"{MARK} [{item()}, {item('get', '{}')},\n{item('météo-2', '{ }')} ] ",
        "",
        (("get_weather", PARIS), ("get", "{}"), ("météo-2", "{ }")),
    ),
    "two lists": Transcript(LISTED + "\n" + LISTED, "", (("get_weather", PARIS),) * 2),
    "text around": Transcript("Let me see. " + LISTED + " Done.", "Let me see.Done.", (("get_weather", PARIS),)),
    "ids": Transcript(f'{MARK} [{item()[:-1]}, "id": "VvvODy9mT"}}]', "", (("get_weather", PARIS),)),
    "arguments first": Transcript(f'{MARK}[{{"arguments": {PARIS}, "name": "get_weather"}}]', "", (("get_weather", PARIS),)),
    "no arguments in a list": Transcript(f'{MARK}[{{"name": "get"}}]', "", (("get", "{}"),)),
    "marks and escapes in strings": Transcript(f"{MARK}[{item(arguments=HARD)}]", "", (("get_weather", HARD),)),
    "unicode": Transcript(f"{MARK}[{item(arguments=EMOJI)}]", "", (("get_weather", EMOJI),)),
    "list that does not end": Transcript(f"{MARK}[{item()}", "", (("get_weather", PARIS),)),
    "list that goes on with text": Transcript(f"{MARK}[{item()} and so]", "and so]", (("get_weather", PARIS),)),
    "a comma too many": Transcript(f"{MARK}[{item()}, ]", "]", (("get_weather", PARIS),)),
    "broken second of a list": Transcript(
        f"{MARK}[{item()}, {item('get', '{1}')}]", item("get", "{1}") + "]", (("get_weather", PARIS),)
    ),
    "broken list, then another": Transcript(
        f"Hm {MARK}[{item('get', '{1}')}] {LISTED}", f"Hm {MARK}[{item('get', '{1}')}]", (("get_weather", PARIS),)
    ),
    "list cut off in the arguments": Transcript(LISTED[:-7], LISTED[:-7]),
    "list cut off behind the arguments": Transcript(LISTED[:-2], LISTED[:-2]),
    "unknown function in a list": Transcript(
        f"{MARK}[{item('got', HARD)}, {item()}]", f"{MARK}[{item('got', HARD)},", (("get_weather", PARIS),)
    ),
    "only unknown functions": Transcript(f"{MARK}[{item('got')}] ", f"{MARK}[{item('got')}] "),
    "arguments are a string": Transcript(f"{MARK}[{item('get', chr(34) * 2)}]", f"{MARK}[{item('get', chr(34) * 2)}]"),
    "empty list": Transcript(MARK + "[]", MARK + "[]"),
    "a list of numbers": Transcript(MARK + "[1, 2]", MARK + "[1, 2]"),
    "named": Transcript(named(), "", (("get_weather", PARIS),)),
    "named, several": Transcript(
        named() + named("get", "{}") + "\n" + named("météo-2", "{ }"),
        "",
        (("get_weather", PARIS), ("get", "{}"), ("météo-2", "{ }")),
    ),
    "named, text around": Transcript("I look.\n" + named() + "\nDone ", "I look.Done ", (("get_weather", PARIS),)),
    "named, with ids": Transcript(
        named(call_id="a1b2c3d4e") + named("get", "{}", "Z9"), "", (("get_weather", PARIS), ("get", "{}"))
    ),
    "named, whitespace": Transcript(MARK + " get[ARGS] {}", "", (("get", "{}"),)),
    "named, marks and escapes": Transcript(
        named(arguments=HARD) + named(arguments=EMOJI), "", (("get_weather", HARD), ("get_weather", EMOJI))
    ),
    "named, unknown function": Transcript(named("got", "{}") + named(), named("got", "{}"), (("get_weather", PARIS),)),
    "named, a longer name": Transcript(named("get_", "{}"), named("get_", "{}")),
    "named, no arguments": Transcript(MARK + "get[ARGS]", MARK + "get[ARGS]"),
    "named, arguments are a list": Transcript(named("get", "[]"), named("get", "[]")),
    "named, broken": Transcript(named("get", '{"a": 01}') + named(), named("get", '{"a": 01}'), (("get_weather", PARIS),)),
    "named, broken by the next": Transcript(named("get", '{"a": ') + named(), named("get", '{"a":'), (("get_weather", PARIS),)),
    "named, cut off": Transcript("So: " + named()[:-1], "So: " + named()[:-1]),
    "named, cut off in the mark": Transcript(named()[: -len(PARIS) - 2], named()[: -len(PARIS) - 2]),
    "named, broken id": Transcript(MARK + "get[CALL_ID]a-b[ARGS]{}", MARK + "get[CALL_ID]a-b[ARGS]{}"),
    "the mark alone": Transcript("a " + MARK + " ", "a " + MARK + " "),
    "cut off in the mark": Transcript("a [TOOL_", "a [TOOL_"),
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(name: str) -> None:
    check(Mistral, TRANSCRIPTS[name])


def test_arguments_of_a_list_are_passed_on_while_they_come() -> None:
    parser = Mistral(FUNCTIONS)
    assert parser.feed('[TOOL_CALLS] [{"name": "get", "arguments": {') == [Piece("call", "get", 0), Piece("arguments", "{", 0)]
    assert parser.feed("}") == [Piece("arguments", "}", 0)]
    assert parser.feed('}, {"name": "get_weather", "arguments": {"a') == [
        Piece("call", "get_weather", 1),
        Piece("arguments", '{"a', 1),
    ]
    assert parser.finish() == [Piece("void", call=1), Piece("content", '{"name": "get_weather", "arguments": {"a')]


def test_arguments_of_a_named_call_are_passed_on_while_they_come() -> None:
    parser = Mistral(FUNCTIONS)
    assert parser.feed("ok [TOOL_CALLS]get[AR") == [Piece("content", "ok")]
    assert parser.feed('GS]{"a') == [Piece("call", "get", 0), Piece("arguments", '{"a', 0)]
    assert parser.feed('": 1}[TOOL_CALLS]get_') == [Piece("arguments", '": 1}', 0)]
    assert parser.feed("weeks") == [Piece("content", "[TOOL_CALLS]get_weeks")]


@settings(max_examples=200, deadline=None)
@given(
    soup(Mistral, [LISTED, item(), item("get", "{}") + ", ", named(), named("get", "{}"), named(arguments=HARD), named("got")])
)
def test_any_text(text: str) -> None:
    check_any(Mistral, text)


@pytest.mark.parametrize(
    "text",
    [
        "word [" * 20_000,
        MARK * 8_000,
        "[TOOL_CALLS" * 9_000,
        (MARK + "get") * 6_000,
        MARK + "get[CALL_ID]" + "a" * 100_000,
        MARK + "[" + (item("get", "{}") + ", ") * 3_000,
        named("get", '{"a": "' + "long " * 20_000 + '"}'),
        named("get", '{"a": "' + "long " * 20_000),
        MARK + " " * 100_000 + "get[ARGS]{}",
    ],
    ids=lambda text: text[:12],
)
def test_a_long_text_costs_its_length(text: str) -> None:
    check_stays_small(Mistral, text)


def test_what_the_grammar_allows_is_calls(bundled_model: Path) -> None:
    check_grammar(Mistral, Sampler(bundled_model))


def test_the_grammar_allows_what_templates_write(bundled_model: Path) -> None:
    one = [LISTED, LISTED.replace("[{", " [{"), named(), named("météo-2", "{}")]
    several = [f"{MARK}[{item()}, {item('get', '{}')}]", named() + named("get", "{}")]
    no = ["", "Hi", MARK, MARK + "[]", named("got", "{}"), named("get_weather", "{}"), LISTED + LISTED, LISTED + named()]
    check_allowed(Mistral, Sampler(bundled_model), one, several, no)
