"""Calls as DeepSeek's models write them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from transcripts import FUNCTIONS, Sampler, Transcript, check, check_allowed, check_any, check_grammar, check_stays_small, soup

from minivllm.text.reply import Piece
from minivllm.text.tools.deepseek_v3 import DeepSeekV3

PARIS = '{"city": "Paris", "unit": "C"}'
ALL, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
HARD = r'{"city": "<｜tool▁call▁end｜> }``` \n```", "unit": "\u00e9\ud83d\ude00\\\"", "days": [[], {"a": {"b": [1]}}]}'
EMOJI = '{"city": "北京 🐼", "unit": "°C <｜tool▁call▁begin｜>get<｜tool▁sep｜>{}"}'


def fenced(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def plain(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


TRANSCRIPTS = {
    "empty": Transcript(""),
    "plain": Transcript("a ｜ < b <｜tool▁output▁begin｜> \n", "a ｜ < b <｜tool▁output▁begin｜> \n"),
    "one call": Transcript(ALL + fenced() + END, "", (("get_weather", PARIS),)),
    "several": Transcript(
        ALL + fenced() + "\n" + fenced("get", "{}") + "\n" + fenced("météo-2", "{ }") + END + "\n",
        "",
        (("get_weather", PARIS), ("get", "{}"), ("météo-2", "{ }")),
    ),
    "text around": Transcript("I see.\n\n" + ALL + fenced() + END + " Done. ", "I see.Done. ", (("get_weather", PARIS),)),
    "newer": Transcript(ALL + plain() + plain("get", "{}") + END, "", (("get_weather", PARIS), ("get", "{}"))),
    "both": Transcript(ALL + plain() + fenced("get", "{}") + END, "", (("get_weather", PARIS), ("get", "{}"))),
    "whitespace": Transcript(
        f"{ALL}\n<｜tool▁call▁begin｜> function<｜tool▁sep｜> get\n\n```json {PARIS} ``` <｜tool▁call▁end｜>\n{END}\n",
        "",
        (("get", PARIS),),
    ),
    "JSON over several lines": Transcript(
        ALL + fenced("get", '{\n  "a": [\n 1]\n}') + END, "", (("get", '{\n  "a": [\n 1]\n}'),)
    ),
    "no outer marks": Transcript("So " + fenced() + plain("get", "{}"), "So", (("get_weather", PARIS), ("get", "{}"))),
    "outer marks each": Transcript((ALL + fenced() + END) * 2, "", (("get_weather", PARIS),) * 2),
    "a function of the type's name": Transcript(
        ALL + plain("function", "{}") + fenced("function", "{ }") + END, "", (("function", "{}"), ("function", "{ }"))
    ),
    "marks and escapes in strings": Transcript(ALL + fenced(arguments=HARD) + END, "", (("get_weather", HARD),)),
    "unicode": Transcript(ALL + plain(arguments=EMOJI) + END, "", (("get_weather", EMOJI),)),
    "broken JSON, then a call": Transcript(
        ALL + fenced("get", '{"a": }') + "\n" + fenced() + END, ALL + fenced("get", '{"a": }'), (("get_weather", PARIS),)
    ),
    "a call, then a broken one": Transcript(
        ALL + fenced() + plain("get", '{"a"}') + END, plain("get", '{"a"}') + END, (("get_weather", PARIS),)
    ),
    "a call cut off by the next": Transcript(
        ALL + plain("get", "{}")[:-5] + plain(), ALL + plain("get", "{}")[:-5], (("get_weather", PARIS),)
    ),
    "the fence does not end": Transcript(
        ALL + fenced().replace("\n```<", "<") + END, ALL + fenced().replace("\n```<", "<") + END
    ),
    "the fence does not begin": Transcript(
        ALL + fenced().replace("```json", "") + END, ALL + fenced().replace("```json", "") + END
    ),
    "something behind the JSON": Transcript(ALL + plain("get", "{}{}") + END, ALL + plain("get", "{}{}") + END),
    "unknown function": Transcript(
        ALL + fenced("got") + "\n" + fenced("get", "{}") + END, ALL + fenced("got"), (("get", "{}"),)
    ),
    "a longer name": Transcript(plain("get_", "{}"), plain("get_", "{}")),
    "some other type": Transcript(fenced().replace("function", "tool"), fenced().replace("function", "tool")),
    "no arguments": Transcript(plain("get", ""), plain("get", "")),
    "arguments are a list": Transcript(ALL + fenced("get", "[]") + END + " ", ALL + fenced("get", "[]") + END + " "),
    "no call inside": Transcript(ALL + " " + END, ALL + " " + END),
    "an end without a beginning": Transcript(END + " a", END + " a"),
    "cut off in the arguments": Transcript("Hm. " + ALL + fenced()[:-30], "Hm. " + ALL + fenced()[:-30]),
    "cut off in the end mark": Transcript(ALL + plain()[:-1], ALL + plain()[:-1]),
    "cut off in the outer end mark": Transcript(ALL + plain() + END[:-1], END[:-1], (("get_weather", PARIS),)),
    "cut off in the begin mark": Transcript("a " + ALL[:-1], "a " + ALL[:-1]),
    "cut off in the name": Transcript(ALL + fenced()[:40], ALL + fenced()[:40]),
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(name: str) -> None:
    check(DeepSeekV3, TRANSCRIPTS[name])


def test_arguments_are_passed_on_while_they_come() -> None:
    parser = DeepSeekV3(FUNCTIONS)
    assert parser.feed("ok\n" + ALL + fenced()[:40]) == [Piece("content", "ok")]
    assert parser.feed(fenced()[40:68]) == [Piece("call", "get_weather", 0), Piece("arguments", '{"city": ', 0)]
    assert parser.feed(fenced()[68:-5]) == [Piece("arguments", '"Paris", "unit": "C"}', 0)]
    assert parser.finish() == [Piece("void", call=0), Piece("content", "\n" + ALL + fenced()[:-5])]


def test_no_more_than_a_name_is_held_back() -> None:
    parser = DeepSeekV3(FUNCTIONS)
    assert parser.feed("a <｜to") == [Piece("content", "a")]
    assert parser.feed("p") == [Piece("content", " <｜top")]
    assert parser.feed("<｜tool▁call▁begin｜>get_w") == []
    assert parser.feed("ork") == [Piece("content", "<｜tool▁call▁begin｜>get_work")]


@settings(max_examples=200, deadline=None)
@given(soup(DeepSeekV3, [fenced(), fenced("get", "{}"), plain(), plain("get", "{}"), plain(arguments=HARD), fenced("got")]))
def test_any_text(text: str) -> None:
    check_any(DeepSeekV3, text)


@pytest.mark.parametrize(
    "text",
    [
        "word <｜" * 15_000,
        ALL * 6_000,
        "<｜tool▁call▁begin｜>" * 6_000,
        ALL[:-1] * 6_000,
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" * 3_000,
        ALL + (fenced("get", "{}") + "\n") * 1_000,
        plain("get", '{"a": "' + "long " * 20_000 + '"}'),
        plain("get", '{"a": "' + "long " * 20_000),
        ALL + "\n" * 100_000 + plain("get", "{}"),
    ],
    ids=lambda text: text[:22],
)
def test_a_long_text_costs_its_length(text: str) -> None:
    check_stays_small(DeepSeekV3, text)


def test_what_the_grammar_allows_is_calls(bundled_model: Path) -> None:
    check_grammar(DeepSeekV3, Sampler(bundled_model))


def test_the_grammar_allows_what_templates_write(bundled_model: Path) -> None:
    one = [ALL + fenced() + END, ALL + plain() + END, ALL + fenced("function", "{}") + END, ALL + plain("function", "{}") + END]
    several = [ALL + fenced() + "\n" + fenced("get", "{}") + END, ALL + plain() + plain("get", "{}") + END]
    no = [
        "",
        "Hi",
        ALL + END,
        fenced(),
        ALL + fenced("got", "{}") + END,
        ALL + plain("get_weather", "{}") + END,
        ALL + plain() + fenced() + END,
    ]
    check_allowed(DeepSeekV3, Sampler(bundled_model), one, several, no)
