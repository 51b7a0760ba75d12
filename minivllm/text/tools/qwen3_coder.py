"""Calls as Qwen3-Coder (Qwen/Qwen3-Coder-30B-A3B-Instruct and its family) writes them, by its chat template.

    I'll look it up.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Berlin
    </parameter>
    <parameter=days>
    3
    </parameter>
    </function>
    </tool_call>

A value is raw text: nothing is quoted or escaped, and one newline at each end belongs to the format. What it means stands in
the function's schema: a string stays as it is, and everything else is JSON where it can be read as such, otherwise a string.
The template itself writes ``True`` and ``None`` for what JSON calls ``true`` and ``null``, so models do too. Of a parameter
that is written twice the last value counts, as in JSON.

The JSON of the arguments is passed on while it comes: a string as it is read, every other value at its end. A value ends at
the first ``</parameter>``; every other mark may stand in it. Whitespace between the marks may be missing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from minivllm.text.reply import Function, Piece
from minivllm.text.tools.held import (
    SPACE,
    Content,
    MarkWatch,
    Outlet,
    either,
    json_inside,
    json_rule,
    json_text,
    length_of,
    properties_of,
    read_json,
    required_of,
    type_name,
    types_of,
    values_of,
)

_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_JOINS: Final = frozenset(("$ref", "allOf", "anyOf", "oneOf"))  # a schema of no single type; without these it is free text
_WORDS: Final = {"boolean": {"true": "true", "false": "false"}, "null": {"null": "null", "none": "null"}}


class Qwen3Coder:
    """Finds calls in a reply. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_CALL, _END_CALL, "<function=", _END_FUNCTION, _PARAMETER, _END_PARAMETER)
    _LENIENT: ClassVar[bool] = False  # what that allows: qwen3_xml.py

    def __init__(self, functions: Sequence[Function]) -> None:
        names = {f"<function={f.name}>": f for f in functions}
        self._functions = names
        self._outside = MarkWatch((_CALL, *names) if self._LENIENT else (_CALL,))
        self._names = MarkWatch(names)
        self._parameters = MarkWatch((_PARAMETER, _END_FUNCTION, *((_END_CALL,) if self._LENIENT else ())))
        self._end = MarkWatch((_END_CALL,))
        lines = (f"\n{_PARAMETER}", f"\n{_END_FUNCTION}") if self._LENIENT else ()
        self._values = MarkWatch((f"\n{_END_PARAMETER}", _END_PARAMETER, *lines))

        self._outlet = Outlet()
        self._content = Content(self._outlet)
        self._watch = self._outside
        self._state = self._read_content
        self._raw: list[str] = []  # the call so far, and the whitespace before it
        self._space: list[str] = []  # whitespace inside the call whose meaning is not known yet
        self._call = -1
        self._function = Function("")
        self._announced = False
        self._closed = False  # the arguments are complete
        self._num_arguments = 0
        self._key: list[str] = []
        self._value: list[str] = []
        self._types = frozenset[str]()
        self._at_line = False  # the newline that begins a value may come now

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        for char in text:
            self._state(char)
        return self._outlet.take()

    def finish(self) -> Sequence[Piece]:
        """The text has ended: an open call is none."""
        if self._state == self._read_value:
            self._watch.release()  # it is part of the raw text already
        if self._state != self._read_content:
            self._give_up()
        self._content.add(self._watch.release())
        self._content.finish()
        return self._outlet.take()

    # ------------------------------------------------------------------------------------------------------------ states

    def _read_content(self, char: str) -> None:
        text, mark = self._watch.add(char)
        self._content.add(text)
        if mark:
            self._raw = [self._content.take_space(), mark]
            self._announced = self._closed = False
            self._take_mark(mark)

    def _read_mark(self, char: str) -> None:
        """Where only whitespace and certain marks may stand."""
        if char in SPACE and not self._watch.held:
            self._space.append(char)
            return
        text, mark = self._watch.add(char)
        if mark:
            self._raw += [*self._space, mark]
            self._space.clear()
            self._take_mark(mark)
        elif text:
            self._give_up(text)

    def _read_key(self, char: str) -> None:
        if char == ">" and self._key:
            self._raw.append(char)
            self._begin_value("".join(self._key))
        elif char in "<>\n":
            self._give_up(char)
        else:
            self._raw.append(char)
            self._key.append(char)

    def _read_value(self, char: str) -> None:
        self._raw.append(char)
        at_line, self._at_line = self._at_line, False
        if at_line and char == "\n":
            return
        text, mark = self._watch.add(char)
        if self._types == {"string"}:
            self._outlet.add("arguments", json_inside(text), self._call)
        else:
            self._value.append(text)
        if mark:
            self._end_value()
            self._watch, self._state = self._parameters, self._read_mark
            if not mark.endswith(_END_PARAMETER):
                self._take_mark(mark.lstrip("\n"))

    # ------------------------------------------------------------------------------------------------------------- parts

    def _take_mark(self, mark: str) -> None:
        """Go on behind a mark that may stand here."""
        self._state = self._read_mark
        if mark == _CALL:
            self._watch = self._names
        elif mark in self._functions:
            self._function = self._functions[mark]
            self._watch = self._parameters
        elif mark == _PARAMETER:
            self._announce()
            self._key.clear()
            self._state = self._read_key
        else:
            if not self._closed:
                self._announce()
                self._outlet.add("arguments", "}", self._call)
                self._closed = True
            self._watch = self._end
            if mark == _END_CALL:
                self._end_call()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            self._num_arguments = 0
            self._call += 1
            self._outlet.add("call", self._function.name, self._call)
            self._outlet.add("arguments", "{", self._call)

    def _begin_value(self, key: str) -> None:
        self._types = types_of(properties_of(self._function.parameters).get(key))
        comma = ", " if self._num_arguments else ""
        quote = '"' if self._types == {"string"} else ""
        self._outlet.add("arguments", f"{comma}{json_text(key)}: {quote}", self._call)
        self._num_arguments += 1
        self._value.clear()
        self._at_line = True
        self._watch, self._state = self._values, self._read_value

    def _end_value(self) -> None:
        text = '"' if self._types == {"string"} else _as_json("".join(self._value), self._types)
        self._outlet.add("arguments", text, self._call)

    def _end_call(self) -> None:
        self._content.call_ended()
        self._raw.clear()
        self._watch, self._state = self._outside, self._read_content

    def _give_up(self, text: str = "") -> None:
        """The text does not go on as a call must. What was read of it becomes content; what did not fit is read again."""
        again = "".join(self._space) + text + self._watch.release()
        self._space.clear()
        if not (self._closed and self._LENIENT):
            if self._announced:
                self._outlet.add("void", call=self._call)
            self._content.add("".join(self._raw))
            self._raw.clear()
            self._watch, self._state = self._outside, self._read_content
        else:
            self._end_call()
        for char in again:
            self._state(char)

    # ----------------------------------------------------------------------------------------------------------- grammar

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """A grammar of calls. A string's pattern and format are not part of it."""
        bodies = [f"function_{i}" for i in range(len(functions))]
        rules = [
            r'start: call ("\n" call)*' if parallel else "start: call",
            rf'call: {mark(_CALL)} "\n" {either(bodies)} "</function>\n" {mark(_END_CALL)}',
        ]
        for name, function in zip(bodies, functions, strict=True):
            rules += _function_rules(name, function)
        return "\n".join(rules) + "\n"


def _as_json(text: str, types: frozenset[str]) -> str:
    """A value that need not be a string."""
    bare = text.strip(SPACE)
    for kind in sorted(types & _WORDS.keys()):
        if (word := _WORDS[kind].get(bare.lower())) is not None:
            return word
    try:
        value = read_json(bare)
    except ValueError:
        return json_text(text)
    if "string" in types:  # one of several types: JSON only where it is of another
        kind = type_name(value)
        if kind == "string" or not (kind in types or (kind == "integer" and "number" in types)):
            return json_text(text)
    return bare


def _function_rules(name: str, function: Function) -> list[str]:
    """The rules of one function's tag and parameters."""
    root = function.parameters
    properties, required = properties_of(root), required_of(root)
    parts, rules = [json_text(f"<function={function.name}>\n")], []
    for i, (key, schema) in enumerate(properties.items()):
        if not key or any(char in key for char in "<>\n"):
            continue
        rule = f"{name}_{i}"
        parts.append(rule if key in required else f"{rule}?")
        rules += _parameter_rules(rule, key, schema, root)
    if "properties" not in root and root.get("additionalProperties") is not False:
        parts.append(f"{name}_any*")
        rules.append(rf'{name}_any: "<parameter=" /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ ">\n" {name.upper()}_ANY')
        rules.append(_text_rule(f"{name.upper()}_ANY", {}))
    return [f"{name}: {' '.join(parts)}", *rules]


def _parameter_rules(rule: str, key: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    begin, types = json_text(f"<parameter={key}>\n"), types_of(schema)
    if values := values_of(schema):
        texts = [v if isinstance(v, str) else json_text(v) for v in values]
        return [f"{rule}: {begin} " + either([json_text(f"{text}\n</parameter>\n") for text in texts])]
    joined = isinstance(schema, Mapping) and not _JOINS.isdisjoint(schema)
    if "string" not in types if types else joined:
        return [rf'{rule}: {begin} {rule}_json "\n</parameter>\n"', f"{rule}_json: {json_rule(schema, root)}"]
    return [f"{rule}: {begin} {rule.upper()}_TEXT", _text_rule(f"{rule.upper()}_TEXT", schema)]


def _text_rule(token: str, schema: Any) -> str:
    """Free text up to the mark that ends it, which makes one token of the grammar: so it may hold every other ``<``."""
    least, most = length_of(schema)
    marks = r"(<\/parameter|\n<parameter=|\n<\/function>)"
    return rf'{token}: (/(?s:.{{{least},{most}}})/ & ~/(?s:.*){marks}(?s:.*)/) "\n</parameter>\n"'
