"""Harmony, the format of gpt-oss: which message is what, alone and behind its reasoning parser, and that no cut shows."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_points import Sampler, calls_of, read, read_anyhow, read_everywhere

from minivllm.text.reasoning.openai_gptoss import OpenAIGptOss
from minivllm.text.reply import Function, Piece, Reply
from minivllm.text.tools.held import json_text
from minivllm.text.tools.openai import MARKS, MAX_HEADER, OpenAI


class Behind:
    """Both parsers, one behind the other."""

    def __init__(self, functions: tuple[Function, ...]) -> None:
        self._reasoning = OpenAIGptOss("<|start|>assistant")
        self._tools = OpenAI(functions)

    def feed(self, text: str) -> list[Piece]:
        return self._pass(self._reasoning.feed(text))

    def finish(self) -> list[Piece]:
        return [*self._pass(self._reasoning.finish()), *self._tools.finish()]

    def _pass(self, pieces) -> list[Piece]:
        return [q for p in pieces for q in (self._tools.feed(p.text) if p.kind == "content" else [p])]


FUNCTIONS = (Function("now"), Function("put"))
ANALYSIS = "<|channel|>analysis<|message|>Hm … 🤔<|end|>"
TO_PUT = "<|channel|>commentary to=functions.put <|constrain|>json<|message|>"
BEGIN = "<|start|>assistant"
PUT = [("put", '{"a": 1}')]

# text, reasoning, content, calls
TRANSCRIPTS = {
    "empty": ("", "", "", []),
    "plain text": ("Hi <|there|>!\n", "", "Hi <|there|>!\n", []),
    "final": ("<|channel|>final<|message|>It rains.\n<|return|>", "", "It rains.\n", []),
    "final without end": ("<|channel|>final<|message|>It rains.<|retu", "", "It rains.<|retu", []),
    "reasoning and answer": (f"{ANALYSIS}{BEGIN}<|channel|>final<|message|>Yes.<|return|>", "Hm … 🤔", "Yes.", []),
    "reasoning without end": ("<|channel|>analysis<|message|>Hm ", "Hm ", "", []),
    "two thoughts": (f"{ANALYSIS}{BEGIN}{ANALYSIS}", "Hm … 🤔\nHm … 🤔", "", []),
    "preamble and answer": (
        f"<|channel|>commentary<|message|>Let me see.<|end|>{BEGIN}<|channel|>final<|message|>Yes.",
        "", "Let me see.\nYes.", [],
    ),
    "call": (TO_PUT + '{"a": 1}<|call|>', "", "", PUT),
    "call without end": (TO_PUT + '{"a": 1}', "", "", PUT),
    "whitespace at the arguments": (TO_PUT + ' \n{"a": 1}\n\n<|call|>\n', "", "", PUT),
    "whitespace in the arguments": (
        TO_PUT + '{\n  "a": {"b": [1, "é🎉 \\" }"]}\n}<|call|>', "", "", [("put", '{\n  "a": {"b": [1, "é🎉 \\" }"]}\n}')]
    ),
    "everything": (
        f"{ANALYSIS}{BEGIN}<|channel|>commentary<|message|>I look.<|end|>{BEGIN}{TO_PUT}" + '{"a": 1}<|call|>',
        "Hm … 🤔", "I look.", PUT,
    ),
    "several calls": (
        f'{TO_PUT}{{"a": 1}}<|call|>{BEGIN}<|channel|>commentary to=functions.now<|message|>{{}}<|call|>',
        "", "", [*PUT, ("now", "{}")],
    ),
    "recipient first": (' to=functions.put<|channel|>commentary json<|message|>{"a": 1}<|call|>', "", "", PUT),
    "recipient first, second message": (
        f'{ANALYSIS}{BEGIN} to=functions.put<|channel|>commentary <|constrain|>json<|message|>{{"a": 1}}<|call|>',
        "Hm … 🤔", "", PUT,
    ),
    "recipient behind the type": (
        '<|channel|>commentary <|constrain|>json to=functions.put<|message|>{"a": 1}<|call|>', "", "", PUT
    ),
    "call as a thought": ('<|channel|>analysis to=functions.put code<|message|>{"a": 1}<|call|>', "", "", PUT),
    "bare name": ('<|channel|>commentary to=put<|message|>{"a": 1}<|call|>', "", "", PUT),
    "marks in a value": (
        TO_PUT + '{"a": "<|channel|>final<|message|><|constrain|>"}<|call|>',
        "", "", [("put", '{"a": "<|channel|>final<|message|><|constrain|>"}')],
    ),
    "a message that has no end": (f'{TO_PUT}{{"a": 1}}{BEGIN}<|channel|>final<|message|>Ok', "", "Ok", PUT),
    "no channel": ("<|message|>Hi<|end|>", "", "Hi", []),
    "unknown function": (
        f"<|channel|>commentary to=functions.rm json<|message|>{{}}<|call|>{BEGIN}{TO_PUT}" + '{"a": 1}<|call|>', "", "{}", PUT
    ),
    "built-in tool": ("<|channel|>analysis to=browser.search code<|message|>{}<|call|>", "{}", "", []),
    "broken JSON": (
        f'{TO_PUT}{{"a": 1<|call|>{BEGIN}{TO_PUT}{{"a": 1}}<|call|>', "", TO_PUT + '{"a": 1<|call|>', PUT
    ),
    "text behind the object": (TO_PUT + '{"a": 1} {"b": 2}<|call|>', "", TO_PUT + '{"a": 1} {"b": 2}<|call|>', []),
    "cut in the arguments": (TO_PUT + '{"a": "x', "", TO_PUT + '{"a": "x', []),
    "no JSON": (TO_PUT + "say hi <|call|>", "", TO_PUT + "say hi <|call|>", []),
    "an array": (TO_PUT + "[1]<|call|>", "", TO_PUT + "[1]<|call|>", []),
    "no arguments": (TO_PUT + " <|call|>", "", TO_PUT + " <|call|>", []),
    "a constant of JavaScript": (TO_PUT + '{"a": NaN}<|call|>', "", TO_PUT + '{"a": NaN}<|call|>', []),
    "end mark in a string": (TO_PUT + '{"a": "<|end|>"}', "", TO_PUT + '{"a": "<|end|>"}', []),
    "cut in a header": (f"{ANALYSIS}{BEGIN}<|channel|>fin", "Hm … 🤔", f"{BEGIN}<|channel|>fin", []),
    "a header that ends too early": (
        f"<|channel|>final<|end|>{BEGIN}<|channel|>{BEGIN}<|channel|>final<|message|>Ok<|return|>",
        "", f"<|channel|>final<|end|>{BEGIN}<|channel|>Ok", [],
    ),
    "text between messages": (f"{ANALYSIS}\n oops \n{BEGIN}<|channel|>final<|message|>Ok", "Hm … 🤔", "\n oopsOk", []),
}  # fmt: skip


@pytest.mark.parametrize("make", [lambda: OpenAI(FUNCTIONS), lambda: Behind(FUNCTIONS)], ids=["alone", "behind"])
@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_a_transcript(make, case: str) -> None:
    text, reasoning, content, calls = TRANSCRIPTS[case]
    reply = read_everywhere(make, text)
    assert (reply.reasoning, reply.content, calls_of(reply)) == (reasoning, content, calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


def test_without_functions_a_call_is_content() -> None:
    text = f"{ANALYSIS}{BEGIN}{TO_PUT}" + '{"a": 1}<|call|>'
    assert read_everywhere(lambda: OpenAI(()), text) == Reply("Hm … 🤔", '{"a": 1}')
    assert read_everywhere(lambda: Behind(()), text) == Reply("Hm … 🤔", '{"a": 1}')


def test_arguments_come_while_they_are_read() -> None:
    parser = OpenAI(FUNCTIONS)
    assert parser.feed(TO_PUT) == []
    assert [(p.kind, p.text) for p in parser.feed('{"a": ')] == [("call", "put"), ("arguments", '{"a":')]
    assert [p.text for p in parser.feed("1, <|ca")] == [" 1,"]
    assert [p.text for p in parser.feed("r")] == [" <|car"]


def test_the_number_of_a_void_call_is_not_used_again() -> None:
    assert list(read(OpenAI(FUNCTIONS), [f"{TO_PUT}{{<|call|>{BEGIN}{TO_PUT}{{}}<|call|>"]).calls) == [1]


def test_what_is_too_long_is_no_header() -> None:
    text = "<|channel|>" + "x" * MAX_HEADER
    parser = OpenAI(FUNCTIONS)
    assert parser.feed(text) == [Piece("content", text)]
    assert parser.feed(" y") == [Piece("content", " y")]


def test_arguments_nested_too_deeply_are_no_call() -> None:
    text = TO_PUT + '{"a": ' * 100_000 + "1" + "}" * 100_000
    assert read(OpenAI(FUNCTIONS), [text]) == Reply(content=text)


WORDS = [
    "analysis",
    "commentary",
    "final",
    "assistant",
    " to=functions.put",
    " to=x",
    " ",
    "x",
    "<|",
    '{"a"',
    ": 1",
    "}",
    "{}",
    "🎉",
]


@settings(max_examples=500, deadline=None)
@given(
    text=st.lists(st.sampled_from([*MARKS, TO_PUT, *WORDS]), max_size=25).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
def test_mark_soup_reads_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    for make in (lambda: OpenAI(FUNCTIONS), lambda: Behind(FUNCTIONS)):
        reply = read_anyhow(make, text, cuts)
        for name, arguments in calls_of(reply):
            assert name == "put"
            assert isinstance(json.loads(arguments), dict)
    assert read_anyhow(lambda: OpenAIGptOss(""), text, cuts).calls == {}


@pytest.mark.parametrize("unit", ["x", " ", "<|", "<|start|>", "<|channel|>a", "<|channel|>final<|message|>x", TO_PUT + "{"])
def test_a_long_text_by_characters(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for begin in ("", "<|channel|>", "<|channel|>final<|message|>", TO_PUT + '{"a": "'):
        reply = read(Behind(FUNCTIONS), begin + text)
        assert not reply.calls
        assert len(reply.content) > 1000


def sampled_schema() -> dict:
    properties = {"s": {"type": "string", "maxLength": 12}, "l": {"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 2}}
    return {"type": "object", "properties": properties, "required": ["s"], "additionalProperties": False}


@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_grammar_allows_is_read_as_calls(parallel: bool, sampler: Sampler) -> None:
    functions = (
        Function("now", {"type": "object", "properties": {}, "additionalProperties": False}),
        Function("put", sampled_schema()),
    )
    source = OpenAI.grammar(functions, parallel, json_text)
    found: list[str] = []
    most = 0
    for text in filter(None, (sampler.draw(source, random.Random(seed).choice) for seed in range(40))):
        reply = read(OpenAI(functions), [text])
        assert reply.content == reply.reasoning == "" and reply.calls, text
        most = max(most, len(reply.calls))
        for name, arguments in calls_of(reply):
            found.append(name)
            assert name == "now" or {"s"} <= json.loads(arguments).keys() <= {"s", "l"}
    assert {"now", "put"} == set(found)
    assert (most > 1) is parallel


def test_the_grammar_of_a_function_without_schema_takes_any_object(sampler: Sampler) -> None:
    source = OpenAI.grammar(FUNCTIONS, False, json_text)
    assert sampler.allows(source, TO_PUT + '{"a": [1]}')
    assert not sampler.allows(source, TO_PUT + "[1]")


def test_marks_are_written_as_the_caller_says() -> None:
    source = OpenAI.grammar(FUNCTIONS, True, lambda text: f"MARK({text})")
    for mark in ("<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|start|>"):
        assert f"MARK({mark})" in source
        assert f'"{mark}"' not in source
