"""What a JSON Schema's grammar would not hold is refused by name or closed, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from minivllm.errors import InvalidRequest
from minivllm.text.grammar import json_grammar, matcher, vocabulary
from minivllm.text.json_schema import allowed_escapes, parts
from minivllm.text.tokenizer import load_tokenizer

AGE = {"age": {"type": "integer"}}
PERSON = {"type": "object", "properties": AGE}


@pytest.fixture(scope="module")
def words(bundled_model: Path) -> LLTokenizer:
    tokenizer = load_tokenizer(bundled_model)
    return vocabulary(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])


def admits(words: LLTokenizer, schema: Any, text: str, compact: bool = False) -> bool:
    """Whether the schema's grammar lets the whole text through."""
    made = matcher(json_grammar(schema, compact), words)
    tokens = words.tokenize_bytes(text.encode())
    return made.try_consume_tokens(tokens) == len(tokens) and (made.is_accepting() or made.is_stopped())


def refusal(words: LLTokenizer, schema: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        matcher(json_grammar(schema), words)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "uses `uniqueItems`, which cannot be enforced"),
        ({"properties": {"a": {"not": {}}}}, "uses `not`"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "uses `if`, `then`"),
        ({"dependencies": {"a": ["b"]}}, "uses `dependencies`"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "`oneOf` with choices that may hold together"),
        ({"$ref": "https://example.org/a.json"}, r"another document (https://example.org/a.json), and none is fetched"),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"type": "object", "minProperties": 2}, "uses `minProperties` (2)"),
        ({"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"minProperties": 3, "required": ["a"]}}}, "`minProperties` (3)"),
        ({"anyOf": [{"type": "null"}, {"items": {"minProperties": 5, "required": ["a", "a", "b"]}}]}, "`minProperties` (5)"),
        (False, "is an object (or true)"),
        ([], "is an object (or true)"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(words: LLTokenizer, schema: Any, says: str) -> None:
    assert says in refusal(words, schema)


def test_a_schema_cannot_switch_the_refusals_off(words: LLTokenizer) -> None:
    lenient = {"lenient": True, "coerce_one_of": True, "whitespace_pattern": " *", "json_allow_general_unicode_escapes": True}
    assert "`uniqueItems`" in refusal(words, {"x-guidance": lenient, "type": "array", "uniqueItems": True})
    assert "`oneOf`" in refusal(words, {"x-guidance": lenient, "oneOf": [{"type": "number"}, {"type": "integer"}]})
    for compact in (True, False):
        assert not admits(words, {"x-guidance": lenient, "type": "array"}, "[1,    2]", compact)
        assert not admits(words, {"x-guidance": lenient, **PERSON}, r'{"\u0061ge":"x"}', compact)


# ------------------------------------------------------------------------------------------------------- names of properties


@pytest.mark.parametrize("least", [0, 1, 2, 3])
def test_repeated_names_do_not_fill_an_object(words: LLTokenizer, least: int) -> None:
    """Required names come once each and one more name is one more property, so that many can be promised."""
    schema = {"type": "object", "required": ["a", "b"], "minProperties": least}
    assert admits(words, schema, '{"a": 1, "b": 2, "c": 3, "c": 4}')
    assert admits(words, schema, '{"a": 1, "b": 2}') == (least < 3)
    assert not admits(words, schema, '{"a": 1, "c": 2, "c": 3}')


@pytest.mark.parametrize("known", [{"properties": AGE}, {"patternProperties": {"^age$": {"type": "integer"}}}])
def test_a_known_name_has_one_spelling(words: LLTokenizer, known: dict[str, Any]) -> None:
    assert admits(words, known, '{"age": 3}') and admits(words, known, '{"other": "x"}')
    for name in ("age", r"\u0061ge", r"a\u0067e", r"\u0061\u0067\u0065"):
        text = f'{{"{name}": "x"}}'
        assert json.loads(text) == {"age": "x"}  # no integer, so not valid
        assert not admits(words, known, text)


@pytest.mark.parametrize("name", ["\n", "\t", '"', "\\", "/", "\x7f", "é", "😀"])
def test_names_of_odd_characters_have_one_spelling_too(words: LLTokenizer, name: str) -> None:
    schema = {"properties": {name: {"type": "integer"}}}
    escaped = "".join(f"\\u{ord(c):04x}" for c in name if ord(c) < 0x10000)
    assert admits(words, schema, json.dumps({name: 1}, ensure_ascii=False))
    for spelling in (json.dumps(name, ensure_ascii=False), json.dumps(name), f'"{escaped}"', r'"\/"' if name == "/" else '""'):
        if json.loads(spelling) == name:
            assert not admits(words, schema, f'{{{spelling}: "x"}}')


def test_control_characters_are_lost_only_where_names_mix(words: LLTokenizer) -> None:
    for text in (r'{"a": "\u001b"}', r'{"a": "\u0000\n"}'):
        assert admits(words, {"type": "object"}, text)
        assert admits(words, {"properties": {"a": {"type": "string"}}, "additionalProperties": False}, text)
        assert not admits(words, {"properties": {"a": {"type": "string"}}}, text)
    assert admits(words, {"properties": {"a": {"type": "string"}}}, r'{"a": "\n\t\"\\é\r"}')


# ------------------------------------------------------------------------------------------------------- where schemas stand


def test_only_schemas_are_looked_at(words: LLTokenizer) -> None:
    """Data, and names of properties that are words of the language, ask for nothing."""
    bad = {"type": "object", "minProperties": 9}
    for schema in ({"enum": [bad, 1]}, {"const": bad}, {"type": "null", "default": bad}, {"type": "null", "examples": [bad]}):
        json_grammar(schema)
    named = {"properties": {"minProperties": {"type": "integer"}, "enum": {"type": "integer"}, "properties": {"type": "null"}}}
    assert admits(words, named, '{"minProperties": 9, "enum": 2, "properties": null}')
    for keyword in ("enum", "const", "default", "examples", "properties"):
        assert "minProperties" in refusal(words, {"properties": {keyword: bad}})
        assert "minProperties" in refusal(words, {"$defs": {keyword: bad}, "$ref": f"#/$defs/{keyword}"})


def test_parts_are_all_schemas_inside() -> None:
    schema = {
        "properties": {"a": {"title": "1"}, "properties": {"title": "2"}},
        "items": [{"title": "3"}],
        "anyOf": [{"title": "4", "not": {"title": "5"}}, True],
        "additionalProperties": {"title": "6", "enum": [{"title": "no"}]},
        "$defs": {"b": {"patternProperties": {"^x": {"title": "7"}}}},
    }
    assert sorted(p["title"] for p in parts(schema) if "title" in p) == list("1234567")
    deep: Any = {}
    for _ in range(50_000):
        deep = {"items": deep}
    assert sum(1 for _ in parts(deep)) == 50_001  # as deep as anybody likes


def test_a_schema_nested_too_deeply_is_refused(words: LLTokenizer) -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = {"items": deep}
    assert "nested too deeply" in refusal(words, deep)
    assert "nested more than 100 deep" in refusal(words, '{"items":' * 50_000 + "{}" + "}" * 50_000)


def test_true_is_any_json(words: LLTokenizer) -> None:
    assert admits(words, True, '[1, {"a": null}]') and not admits(words, True, "[1")
    assert allowed_escapes({}) == 'nrbtf\\"u'
