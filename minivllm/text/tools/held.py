"""What parsers that read a reply character by character have in common.

A parser whose state depends on the characters read so far, and on nothing else, cannot notice how the text was cut into parts.
What it does have to know is which text it holds back, and there are only three kinds: the beginning of a mark (``MarkWatch``),
whitespace that may stand before a call and then belongs to the format (``Content``), and the raw text of an open call.
Each is kept as parts that are joined once, so a reply costs time in proportion to its length.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from minivllm.text.reply import Kind, Piece

SPACE: Final = " \t\r\n"
_TYPES: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
DEFINITIONS: Final = frozenset(("$defs", "definitions"))
MAX_DEPTH: Final = 128  # of lists and objects in each other: beyond, whoever reads the JSON could run out of stack


class MarkWatch:
    """Looks for marks in a text, one character at a time. Written by the parser that made it. Of two marks that begin at the
    same place, the shorter wins."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.held = ""  # the end of the text, as far as a mark may have begun there
        self._marks = frozenset(marks)
        self._firsts = frozenset(mark[0] for mark in self._marks)
        self._beginnings = frozenset(mark[:n] for mark in self._marks for n in range(1, len(mark)))

    def add(self, char: str) -> tuple[str, str]:
        """Read a character: text that is certain to be part of no mark, and the mark that is now complete, or ""."""
        if not self.held and char not in self._firsts:
            return char, ""
        held = self.held + char
        for begin in range(len(held)):
            rest = held[begin:]
            if rest in self._marks:
                self.held = ""
                return held[:begin], rest
            if rest in self._beginnings:
                self.held = rest
                return held[:begin], ""
        self.held = ""
        return held, ""

    def release(self) -> str:
        """The text that was held back, which is no mark."""
        held, self.held = self.held, ""
        return held


class Outlet:
    """The pieces that one ``feed`` gives, neighbours of one kind put together. Written by the parser that made it."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Kind, int, list[str]]] = []

    def add(self, kind: Kind, text: str = "", call: int = 0) -> None:
        """Put a piece at the end."""
        if self._pieces and self._pieces[-1][:2] == (kind, call):
            self._pieces[-1][2].append(text)
        elif text or kind == "void":  # an empty part says nothing
            self._pieces.append((kind, call, [text]))

    def take(self) -> list[Piece]:
        """The pieces since the last time."""
        pieces, self._pieces = self._pieces, []
        return [Piece(kind, "".join(parts), call) for kind, call, parts in pieces]


class Content:
    """Plain text around calls. Whitespace is held back until it is known what follows: before a call, and behind the last one,
    it belongs to the format. Written by the parser that made it."""

    def __init__(self, outlet: Outlet, kind: Kind = "content") -> None:
        self._outlet = outlet
        self._kind: Kind = kind
        self._space: list[str] = []
        self._behind_call = False

    def add(self, text: str) -> None:
        """Text that is part of no call."""
        body = text.rstrip(SPACE)
        if body:
            self._outlet.add(self._kind, self.take_space() + body)
            self._behind_call = False
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def take_space(self) -> str:
        """The whitespace that is held back; the caller owns it now."""
        space = "".join(self._space)
        self._space.clear()
        return space

    def call_ended(self) -> None:
        """A call stood here."""
        self._behind_call = True

    def finish(self) -> None:
        """The text has ended."""
        space = self.take_space()
        if not self._behind_call:
            self._outlet.add(self._kind, space)


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ``ValueError`` for whatever is none or is nested too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [child for v in layer if isinstance(v, dict | list) for child in (v.values() if isinstance(v, dict) else v)]
        if not layer:
            return
    raise ValueError("nested too deeply")


def json_text(value: Any) -> str:
    """A value as JSON. Half a surrogate pair, which UTF-8 cannot carry, is written as an escape."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() else "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)


def json_inside(text: str) -> str:
    """A part of a string as it stands between the quotes of JSON."""
    return json_text(text)[1:-1]


# ----------------------------------------------------------------------------------------------------------------- schemas


def properties_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a function's schema names, each with its own schema. One that only refers to a definition is
    replaced by it; references further inside stay."""
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {key: _resolve(schema, parameters) for key, schema in properties.items()}


def _resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    for _ in range(8):  # references may run in a circle
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/") or reference.count("/") != 2:
            break
        _, place, name = reference.split("/")
        table = root.get(place)
        if not isinstance(table, Mapping) or name not in table:
            break
        schema = table[name]
    return schema


def required_of(parameters: Mapping[str, Any]) -> frozenset[str]:
    """The names of the parameters that must be there."""
    required = parameters.get("required")
    return frozenset(n for n in required if isinstance(n, str)) if isinstance(required, list | tuple) else frozenset()


def type_name(value: Any) -> str:
    """What a schema calls the type of a value."""
    return _TYPES.get(type(value), "object")


def values_of(schema: Any) -> list[Any]:
    """The values that a schema lists, if it does."""
    if not isinstance(schema, Mapping):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return list(values) if isinstance(values, list | tuple) else []


def types_of(schema: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; none: any."""
    if not isinstance(schema, Mapping) or depth > 8:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list | tuple):
        return frozenset(n for n in named if isinstance(n, str))
    if values := values_of(schema):
        return frozenset(map(type_name, values))
    options = schema.get("anyOf", schema.get("oneOf"))
    each = [types_of(o, depth + 1) for o in options] if isinstance(options, list | tuple) else []
    return frozenset[str]().union(*each) if all(each) else frozenset()


def length_of(schema: Any) -> tuple[int, int | str]:
    """How many characters a string has, at least and at most; "" for any number."""
    if not isinstance(schema, Mapping) or types_of(schema) != {"string"}:
        return 0, ""
    least, most = schema.get("minLength"), schema.get("maxLength")
    return least if isinstance(least, int) else 0, most if isinstance(most, int) else ""


def json_rule(schema: Any, root: Mapping[str, Any] | None = None) -> str:
    """The right side of a grammar's rule for JSON text that a schema describes. ``root``: the schema around it, whose
    definitions it may refer to."""
    whole = dict(schema) if isinstance(schema, Mapping) else {}
    if root is not None and '"$ref"' in json_text(whole):
        for name in DEFINITIONS & root.keys():
            whole.setdefault(name, root[name])
    return "%json " + json_text(whole)


def either(alternatives: Sequence[str]) -> str:
    """One of several parts of a rule."""
    return "(" + " | ".join(alternatives) + ")"
