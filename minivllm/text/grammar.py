"""Grammars: what clients may ask a text to be, and what follows it.

A request names a JSON Schema, a regular expression, a list of choices or a grammar; all of them become a ``types.Grammar``, of
which llguidance makes a *matcher*: a lexer and an Earley parser over the bytes of the vocabulary. It says, after each token,
which tokens may come next (a bit mask) and which must. Why llguidance: docs/architecture.md, "Dependencies".

A stranger wrote the grammar, so everything about it is bounded (``LIMITS``): how large it may be, how much work one mask may
take, how many states its lexer may have. Beyond a bound the matcher says that it failed; it raises nothing and never hangs.

Between the parts of JSON text there may be a space, or a line break and the next line's indentation, as every writer of JSON
puts them. Any amount of whitespace would be valid too, but a model that falls into writing spaces could then fill its whole
output with them without ever leaving the grammar; several engines of this field have that fault.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from minivllm.errors import InvalidRequest
from minivllm.text.depth import check_depth
from minivllm.text.grammar_size import check_forced, check_pattern
from minivllm.text.json_schema import allowed_escapes, check_schema, reason_in_words
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import Grammar

WHITESPACE: Final = r"(\x20|\r?\n[\x20\t]{0,32})?"
COMPACT: Final = {"whitespace_flexible": False}  # "x-guidance" of a schema inside a grammar whose JSON has no whitespace
MAX_CHOICES: Final = 1024
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=100_000,  # of one mask: about 7 ms
    step_max_items=50_000,  # of one mask: about 3 ms
    max_lexer_states=30_000,  # 1 to 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,  # its words may be shown to the client; parts of its own states should not be
)


def json_grammar(schema: str | bool | Mapping[str, Any], compact: bool = False) -> Grammar:
    """JSON text that a schema describes; properties come in the schema's order. Raises ``InvalidRequest``."""
    if isinstance(schema, str):
        check_depth(schema.encode("utf-8", "replace"), "structured_outputs.json")
        try:
            schema = json.loads(schema)
        except ValueError:
            raise InvalidRequest("The JSON Schema is not valid JSON; send it as a JSON object.") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequest("A JSON Schema that a text can follow is an object (or true); send one.")
    check_schema(schema)
    try:
        return Grammar("json", json.dumps(schema, ensure_ascii=False), compact)
    except RecursionError:
        raise InvalidRequest("The JSON Schema is nested too deeply; flatten it with `$defs` and `$ref`.") from None


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of several texts. Raises ``InvalidRequest``."""
    if not 0 < len(choices) <= MAX_CHOICES or any(not isinstance(c, str) or not c for c in choices):
        raise InvalidRequest(f"choice takes from 1 to {MAX_CHOICES} texts, none of them empty.", "structured_outputs.choice")
    return Grammar("lark", "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in dict.fromkeys(choices)))


def text_grammar(source: str) -> Grammar:
    """A grammar that a client wrote, as Lark (``start: ...``) or GBNF (``root ::= ...``)."""
    return Grammar("lark", source)


def vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """A vocabulary as matchers walk it. ``vocab_size``: of the model's logits. Takes up to a second for 150,000 tokens."""
    return words_of(tokenizer.as_json(), max(vocab_size, tokenizer.vocab_size), tokenizer.known_ids(eos_token_ids))


def words_of(tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The same from the text of a tokenizer.json. ``vocab_size``: of logits or tokenizer, whichever has more. The tokens that
    end a text must be the tokenizer's."""
    return LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def matcher(grammar: Grammar, words: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of a text. Raises ``InvalidRequest`` with llguidance's own words for a grammar that it cannot
    follow or that goes beyond the limits."""
    try:
        made = LLMatcher(words, _source(grammar), log_level=0, limits=LIMITS)
    except InvalidRequest:
        raise
    except Exception as error:  # a stranger's text: any way in which reading it can fail is about this request
        raise _refused(str(error)) from None
    if made.is_error():
        raise _refused(made.get_error())
    return made


def try_out(grammar: Grammar, words: LLTokenizer) -> None:
    """Make a matcher and let it begin: a lexer is built when it is first asked. Raises ``InvalidRequest``."""
    made = matcher(grammar, words)
    made.compute_ff_tokens()
    made.compute_bitmask()
    if made.is_error():
        raise _refused(made.get_error())


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ``InvalidRequest`` for what must not be followed."""
    if grammar.kind == "regex":
        check_pattern(grammar.source)
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(_lark(any_to_lark(grammar.source)))
    schema = json.loads(grammar.source)
    options = _json_options(schema, grammar.compact)
    return LLMatcher.grammar_from_json_schema(grammar.source, overrides=options)  # type: ignore[arg-type]


def _json_options(schema: Mapping[str, Any], compact: bool) -> dict[str, Any]:
    """How JSON of a checked schema is written. Each option is set, so that none can come with the schema (llguidance reads them
    from "x-guidance"): ``lenient`` there would drop what cannot be enforced without a word."""
    check_forced(schema)
    check_schema(schema)
    return {
        "lenient": False,
        "coerce_one_of": False,
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": not compact,
        "whitespace_pattern": None if compact else WHITESPACE,
        "json_allowed_escapes": allowed_escapes(schema),
        "json_allow_general_unicode_escapes": False,
    }


def _lark(source: str) -> str:
    """A checked grammar. Schemas in it (``%json {...}``) are held to what every schema is held to."""
    parts: list[str] = []
    at = 0
    for found in re.finditer(r"%json\s", source):
        if found.start() < at:
            continue  # inside a schema
        try:
            schema, end = json.JSONDecoder().raw_decode(source, found.end())
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong with it
        if not isinstance(schema, dict):
            continue
        options = _json_options(schema, compact=schema.get("x-guidance") == COMPACT)
        parts += [_line_by_line(source[at : found.end()]), json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)]
        at = end
    return "".join([*parts, _line_by_line(source[at:])])


def _line_by_line(source: str) -> str:
    for line in source.splitlines():
        check_pattern(line)
    return source


def _refused(reason: str) -> InvalidRequest:
    short = " ".join(reason.partition("<backtrace>")[0].split())[:300]  # no addresses and paths of this program
    words = reason_in_words(reason)
    return InvalidRequest(words or f"The grammar cannot be followed here: {short}; change or simplify it.")
