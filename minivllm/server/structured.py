"""Structured output, as requests ask for it: ``response_format`` (OpenAI's) and ``structured_outputs`` (vLLM's).

Both name what the text must be; ``text/grammar.py`` makes one ``Grammar`` of it. ``strict`` changes nothing: a schema is always
followed to the letter.
"""

from typing import Any, Literal

import msgspec

from minivllm.errors import InvalidRequest, UnsupportedField
from minivllm.types import Grammar

KINDS = ("json", "regex", "choice", "grammar", "json_object")


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """A schema with a name."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """Field ``response_format``."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """Field ``structured_outputs``: one of ``KINDS``, and how."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


def grammar_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> Grammar | None:
    """What a request wants its text to be; None: any text. Raises ``InvalidRequest``, ``UnsupportedField``."""
    asked = None if response_format is None else _of_response_format(response_format)
    if structured_outputs is None:
        return asked
    if asked is not None:
        raise InvalidRequest(
            "response_format and structured_outputs both say what the text must be; send one.", "response_format"
        )
    return _of_structured_outputs(structured_outputs)


def _of_response_format(asked: ResponseFormat) -> Grammar | None:
    from minivllm.text.grammar import json_grammar  # imports llguidance, which most servers never need

    if asked.type == "structural_tag":
        raise UnsupportedField("response_format.type", "use json_schema, or structured_outputs with a grammar")
    if (asked.type == "json_schema") != (asked.json_schema is not None):
        raise InvalidRequest('response_format needs json_schema with type "json_schema", and only then.', "response_format")
    if asked.json_schema is not None:
        return json_grammar(asked.json_schema.schema)
    return json_grammar({"type": "object"}) if asked.type == "json_object" else None


def _of_structured_outputs(asked: StructuredOutputs) -> Grammar:
    from minivllm.text.grammar import choice_grammar, json_grammar, text_grammar

    for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
        if getattr(asked, name) not in (None, False):
            raise UnsupportedField(f"structured_outputs.{name}")
    given = [name for name in KINDS if getattr(asked, name) not in (None, False)]
    if len(given) != 1:
        raise InvalidRequest(f"structured_outputs takes exactly one of {', '.join(KINDS)}.", "structured_outputs")
    compact = bool(asked.disable_any_whitespace)
    if asked.regex is not None:
        return Grammar("regex", asked.regex)
    if asked.choice is not None:
        return choice_grammar(asked.choice)
    if asked.grammar is not None:
        return text_grammar(asked.grammar)
    return json_grammar({"type": "object"} if asked.json is None else asked.json, compact)
