"""Calls as a list of Python expressions (meta-llama/Llama-3.2-3B-Instruct, the Llama 4 models, Team-ACE/ToolACE-2-8B).

    [get_weather(city="Berlin", days=3), list_stations(area={"lat": 52.5, "lon": 13.4})]

The chat templates ask for it in words, in the system message, and the list is the whole reply; Llama 4 may put
``<|python_start|>`` and ``<|python_end|>`` around it. So the reply begins with ``[`` and the call of an offered function, or it
holds no calls.

Arguments are named, and their values are literals: strings in either quotes, numbers, ``True``, ``False``, ``None``, lists and
dicts whose keys are strings. The JSON of a literal is written while the literal is read; nothing is evaluated, and a text that
is no literal ends the call. What JSON calls ``true``, ``false`` and ``null`` is understood too, and a line break may stand in a
string. Tuples, sets, triple quotes, prefixes (``r""``) and neighbouring strings are no literals here.

A call is complete with its ``)``: where the list breaks off later, the calls before stay and the rest is content. Of an
argument that is written twice the last value counts, as in JSON.
"""

from collections.abc import Callable, Generator, Sequence
from math import isfinite
from string import hexdigits, octdigits
from sys import maxunicode
from typing import Any, ClassVar, Final

from minivllm.text.reply import Function, Piece
from minivllm.text.tools.held import (
    MAX_DEPTH,
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
    types_of,
    values_of,
)

Reader = Generator[None, str, None]  # a part of the parser: it stops wherever the characters have run out

_START, _END = "<|python_start|>", "<|python_end|>"
_WORDS: Final = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_DIGITS: Final = frozenset("0123456789+-.")
_NUMBER: Final = _DIGITS | frozenset("_eE")
_QUOTES: Final = ("'", '"')
_ESCAPES: Final = {
    **{"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a"},
    **{"\n": "", "\\": "\\", "'": "'", '"': '"'},
}
_HEX: Final = {"x": 2, "u": 4, "U": 8}  # digits behind the letter
_IDENTIFIER: Final = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"


class _Broken(Exception):
    """The text does not go on as a list of calls must."""


class Pythonic:
    """Finds calls in a reply. Written by whoever reads the text.

    The methods that read are one recursive descent, written as if the whole text lay there: ``_char`` is the character that
    comes next, and ``self._char = yield`` steps over it and waits for the one behind it.
    """

    MARKS: ClassVar[tuple[str, ...]] = ()  # Llama 4's two special tokens need not be shown

    def __init__(self, functions: Sequence[Function]) -> None:
        names = [f.name for f in functions]
        self._names = frozenset(names)
        self._beginnings = frozenset(name[:n] for name in names for n in range(1, len(name) + 1))
        self._outlet = Outlet()
        self._content = Content(self._outlet)
        self._behind = MarkWatch((_END,))
        self._raw: list[str] = []  # what follows the last complete call
        self._call = -1
        self._announced = False  # a call is open
        self._char = ""
        self._reader: Reader | None = self._read_list()
        next(self._reader)

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        for char in text:
            if self._reader is None:
                self._content.add(self._behind.add(char)[0])
                continue
            self._raw.append(char)
            try:
                self._reader.send(char)
            except StopIteration:  # the list has ended well
                self._reader = None
                self._content.call_ended()
            except _Broken:
                self._break_off()
        return self._outlet.take()

    def finish(self) -> Sequence[Piece]:
        """The text has ended: an open call is none."""
        if self._reader is not None:
            self._break_off()
        self._content.add(self._behind.release())
        self._content.finish()
        return self._outlet.take()

    def _break_off(self) -> None:
        """From here on everything is content."""
        self._reader = None
        self._behind = MarkWatch(())
        if self._announced:
            self._outlet.add("void", call=self._call)
        self._content.add("".join(self._raw))

    def _write(self, text: str) -> None:
        self._outlet.add("arguments", text, self._call)

    # ------------------------------------------------------------------------------------------------------ list and calls

    def _skip_space(self) -> Reader:
        while self._char in SPACE:
            self._char = yield

    def _step(self) -> Reader:
        """Over a character and the whitespace behind it."""
        self._char = yield
        yield from self._skip_space()

    def _need(self, char: str) -> None:
        if self._char != char:
            raise _Broken

    def _read_list(self) -> Reader:
        yield from self._step()
        if self._char == "<":
            for char in _START:
                self._need(char)
                self._char = yield
            yield from self._skip_space()
        self._need("[")
        while True:
            yield from self._step()
            if self._char == "]" and self._call >= 0:
                return
            yield from self._read_call()
            yield from self._step()
            if self._char == "]":
                return
            self._need(",")

    def _read_call(self) -> Reader:
        name = ""
        while name + self._char in self._beginnings:
            name += self._char
            self._char = yield
        if name not in self._names:
            raise _Broken
        self._need("(")
        yield from self._step()
        while self._char != ")":
            yield from self._read_argument(name)
            if self._char == ",":
                yield from self._step()
            else:
                self._need(")")
        self._announce(name)
        self._write("}")
        self._announced = False
        self._raw.clear()

    def _announce(self, name: str) -> None:
        if not self._announced:
            self._announced = True
            self._call += 1
            self._outlet.add("call", name, self._call)
            self._write("{")

    def _read_argument(self, name: str) -> Reader:
        key: list[str] = []
        while _in_key(self._char):
            key.append(self._char)
            self._char = yield
        yield from self._skip_space()
        if not key:
            raise _Broken
        self._need("=")
        if self._announced:
            self._write(", ")
        self._announce(name)
        self._write(json_text("".join(key)) + ": ")
        yield from self._step()
        yield from self._read_value(0)

    # ------------------------------------------------------------------------------------------------------------ literals

    def _read_value(self, depth: int) -> Reader:
        """A literal and the whitespace behind it."""
        char = self._char
        if char in _QUOTES:
            yield from self._read_string()
        elif char in _DIGITS:
            yield from self._read_number()
        elif char in ("[", "{"):
            yield from self._read_container("]" if char == "[" else "}", depth + 1)
        else:
            yield from self._read_word()
        yield from self._skip_space()

    def _read_container(self, closer: str, depth: int) -> Reader:
        if depth > MAX_DEPTH:
            raise _Broken
        self._write(self._char)
        yield from self._step()
        empty = True
        while self._char != closer:
            if not empty:
                self._write(", ")
            empty = False
            if closer == "}":
                yield from self._read_key()
            yield from self._read_value(depth)
            if self._char == ",":
                yield from self._step()
            else:
                self._need(closer)
        self._write(closer)
        self._char = yield

    def _read_key(self) -> Reader:
        """A dict's key, up to its value."""
        if self._char not in _QUOTES:
            raise _Broken
        yield from self._read_string()
        yield from self._skip_space()
        self._need(":")
        self._write(": ")
        yield from self._step()

    def _read_string(self) -> Reader:
        quote = self._char
        self._write('"')
        self._char = yield
        while self._char != quote:
            if self._char == "\\":
                yield from self._read_escape()
            else:
                self._write(json_inside(self._char))
                self._char = yield
        self._write('"')
        self._char = yield

    def _read_escape(self) -> Reader:
        """As Python reads it: what is no escape stays as it is; so does ``\\N{...}``, which needs a table of names."""
        self._char = yield
        digits = ""
        if self._char in _HEX:
            wanted = _HEX[self._char]
            while len(digits) < wanted:
                self._char = yield
                if self._char not in hexdigits:
                    raise _Broken
                digits += self._char
            if (code := int(digits, 16)) > maxunicode:
                raise _Broken
            self._write(json_inside(chr(code)))
            self._char = yield
        elif self._char in octdigits:
            while self._char in octdigits and len(digits) < 3:
                digits += self._char
                self._char = yield
            self._write(json_inside(chr(int(digits, 8))))
        else:
            self._write(json_inside(_ESCAPES.get(self._char, "\\" + self._char)))
            self._char = yield

    def _read_number(self) -> Reader:
        parts: list[str] = []
        while self._char in _NUMBER:
            parts.append(self._char)
            self._char = yield
        self._write(_number("".join(parts)))

    def _read_word(self) -> Reader:
        parts: list[str] = []
        while self._char.isalpha():
            parts.append(self._char)
            self._char = yield
        word = _WORDS.get("".join(parts))
        if word is None:
            raise _Broken
        self._write(word)

    # ------------------------------------------------------------------------------------------------------------- grammar

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """A grammar of calls. A string's pattern and format are not part of it; lists and dicts are written as JSON."""
        calls = [f"function_{i}" for i in range(len(functions))]
        more = '(", " call)*' if parallel else ""
        rules = [f'start: "[" call {more} "]"', f"call: {either(calls)}"]
        for name, function in zip(calls, functions, strict=True):
            rules += _function_rules(name, function)
        return "\n".join(rules) + "\n"


def _in_key(char: str) -> bool:
    return char.isalnum() or char in ("_", "-", ".", "$")


def _number(text: str) -> str:
    """The JSON of a Python number: most are written alike."""
    try:
        read_json(text)
        return text
    except ValueError:
        pass
    try:
        value: int | float = int(text) if text.strip("+-_0123456789") == "" else float(text)
    except ValueError:
        raise _Broken from None
    if not isfinite(value):
        raise _Broken
    return repr(value)


def _function_rules(name: str, function: Function) -> list[str]:
    """The rules of one function. Arguments come in the schema's order: ``_first_i`` is what may follow from argument i on while
    none was written, ``_next_i`` the same behind another one."""
    root = function.parameters
    arguments = [(key, schema) for key, schema in properties_of(root).items() if key and all(map(_in_key, key))]
    required = required_of(root)
    opening = json_text(function.name + "(")
    rules = [f'{name}: {opening} {name}_first_0 ")"']
    for i, (key, schema) in enumerate(arguments):
        argument, later = f"{name}_argument_{i}", f"{name}_next_{i + 1}"
        value = _literal(schema)
        if not value:
            value = f"{argument}_json"
            rules.append(f"{value}: {json_rule(schema, root)}")
        first, following = f"{argument} {later}", f'", " {argument} {later}'
        if key not in required:
            first, following = f"{first} | {name}_first_{i + 1}", f"{following} | {later}"
        rules += [
            f"{name}_first_{i}: {first}",
            f"{name}_next_{i}: {following}",
            f"{argument}: {json_text(key + '=')} {value}",
        ]
    if "properties" in root or root.get("additionalProperties") is False:
        return [*rules, f'{name}_first_{len(arguments)}: ""', f'{name}_next_{len(arguments)}: ""']
    return [
        *rules,
        f'{name}_first_0: ({name}_any (", " {name}_any)*)?',
        f'{name}_any: {_IDENTIFIER} "=" {name}_json',
        f"{name}_json: {json_rule({})}",
    ]


def _literal(schema: Any) -> str:
    """The grammar of a literal that Python and JSON do not write alike, or of a string; "" for every other one."""
    words = {"true": "True", "false": "False", "null": "None"}
    values, types = values_of(schema), types_of(schema)
    if values:
        return either([json_text(words.get(text, text)) for text in map(json_text, values)])
    if types == {"string"}:
        least, most = length_of(schema)
        return rf'/"(?s:[^"\\\r\n]|\\["\\ntr]){{{least},{most}}}"/'
    if types and types <= {"boolean", "null"}:
        return either([f'"{words[word]}"' for word in words if ("null" if word == "null" else "boolean") in types])
    return ""
