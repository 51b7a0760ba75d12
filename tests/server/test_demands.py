"""What requests demand, in every way in which models write calls: grammars that can be followed and allow what they should."""

from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from minivllm.errors import InvalidRequest
from minivllm.server.demands import Demands
from minivllm.server.tools import offer_of
from minivllm.text.grammar import json_grammar, matcher, try_out, vocabulary
from minivllm.text.reply import Reply
from minivllm.text.reply_parsers import parsers_of
from minivllm.text.tokenizer import Tokenizer, load_tokenizer
from minivllm.text.tools.registry import PARSERS, TRIGGERS
from minivllm.types import Grammar

PARAMETERS = {
    "type": "object", "required": ["a"],
    "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "array", "items": {"type": "object"}}},
}  # fmt: skip


def tools(**more: Any) -> list[dict[str, Any]]:
    functions = ({"name": "get", "parameters": PARAMETERS, **more}, {"name": "news", **more})
    return [{"type": "function", "function": function} for function in functions]


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    return load_tokenizer(bundled_model)


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> LLTokenizer:
    return vocabulary(tokenizer, tokenizer.vocab_size, [0])


def allows(grammar: Grammar, words: LLTokenizer, text: str) -> bool:
    """Whether a text is one of the grammar's, as a whole."""
    made: LLMatcher = matcher(grammar, words)
    tokens = words.tokenize_str(text)
    return bool(made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting())


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("compact", [False, True])
def test_an_answer_in_a_format_or_a_call(name: str, compact: bool, tokenizer: Tokenizer, words: LLTokenizer) -> None:
    parsers = parsers_of(name, "", None)
    asked = json_grammar({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}, compact)
    demands = Demands(asked, offer_of(tools(), None, None), parsers, tokenizer)
    if name in ("llama3_json", "pythonic"):  # their calls begin as JSON does
        with pytest.raises(InvalidRequest, match="No mark tells"):
            demands.grammar(None)
        return
    grammar = demands.grammar(None)
    assert grammar is not None
    try_out(grammar, words)
    assert allows(grammar, words, '{"x":3}') and not allows(grammar, words, '{"x":"3"}')
    assert allows(grammar, words, '{ "x": 3}') != compact
    if name == "hermes":
        assert allows(grammar, words, '<tool_call>\n{"name": "get", "arguments": {"a":"b"}}\n</tool_call>')


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("parallel", [True, False])
def test_demanded_calls(name: str, parallel: bool, tokenizer: Tokenizer, words: LLTokenizer) -> None:
    parsers = parsers_of(name, "", None)
    assert parsers.tools is not None
    grammar = Demands(None, offer_of(tools(), "required", parallel), parsers, tokenizer).grammar(None)
    assert grammar is not None and not grammar.begins_after
    try_out(grammar, words)
    assert not allows(grammar, words, "words") and not allows(grammar, words, "")
    with pytest.raises(InvalidRequest, match="ask for one"):
        Demands(json_grammar(True), offer_of(tools(), "required", parallel), parsers, tokenizer).grammar(None)


@pytest.mark.parametrize("name", PARSERS)
def test_strict_functions(name: str, tokenizer: Tokenizer, words: LLTokenizer) -> None:
    """What the model calls by itself is held from the mark on that begins calls, where there is one."""
    demands = Demands(None, offer_of(tools(strict=True), None, None), parsers_of(name, "", None), tokenizer)
    if name not in TRIGGERS:
        with pytest.raises(InvalidRequest, match="strict holds only"):
            demands.grammar(None)
        return
    grammar = demands.grammar(None)
    assert grammar is not None and grammar.begins_after == (TRIGGERS[name],) and grammar.keeps_last
    made = matcher(grammar, words)
    mark = words.tokenize_str(TRIGGERS[name])
    assert made.try_consume_tokens(mark) == len(mark), "every call of the format begins with the mark"


def test_the_marks_are_special_tokens_where_the_model_has_them(repo: Path) -> None:
    folder = repo.parent / "shared" / "data" / "tokenizers" / "mistral-v3"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there")
    mistral = load_tokenizer(folder)
    parsers = parsers_of("mistral", "", None)
    grammar = Demands(None, offer_of(tools(), "required", None), parsers, mistral).grammar(None)
    assert grammar is not None and f"<[{mistral.special_id('[TOOL_CALLS]')}]>" in grammar.source
    made = matcher(grammar, vocabulary(mistral, mistral.vocab_size, [2]))
    text = '[TOOL_CALLS][{"name": "get", "arguments": {"a": "b"}}]'
    ids = mistral.encode(text, False)
    assert ids[0] in mistral.special_ids and made.try_consume_tokens(ids) == len(ids)
    reader, reply = parsers.reader(offer_of(tools(), None, None).functions, None), Reply()
    assert reader is not None
    reply.add([*reader.feed(text), *reader.finish()])
    assert [call.name for call in reply.calls.values()] == ["get"] and parsers.short_call_ids
