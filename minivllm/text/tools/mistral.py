"""Calls as Mistral's models write them, in both of their ways.

Up to version 7 of Mistral's tokenizers (mistralai/Mistral-7B-Instruct-v0.3, Mistral-Nemo, Mistral-Small-3.1) the mark is
followed by a JSON list::

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]

From version 11 on (Mistral-Small-3.2, Magistral, Devstral) each call has its own mark; version 11 itself has an id in it too::

    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}

What follows the mark tells which it is. Text before the mark is content. A call is whole at its last bracket: a list that ends
too early keeps the calls that it has, and behind a broken one the next mark is looked for.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from minivllm.text.reply import Function
from minivllm.text.tools.call_text import CallText, Steps, WholeTextParser
from minivllm.text.tools.json_call import json_call
from minivllm.text.tools.lark import choice, json_choice, quoted

_BEGIN: Final = "[TOOL_CALLS]"
_ID: Final = "[CALL_ID]"
_ARGUMENTS: Final = "[ARGS]"
_ID_CHARACTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Mistral(WholeTextParser):
    """Finds calls in one reply. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_BEGIN, _ID, _ARGUMENTS)

    @staticmethod
    def _read(text: CallText) -> Steps[None]:
        while (yield from text.until(_BEGIN)):
            yield from text.space()
            if (yield from text.take("[")):
                yield from _list(text)
            else:
                text.settle((yield from _named(text)))

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """See ``ToolParser.grammar``. Both ways are allowed: each model goes on with the one that it was trained on."""
        items, named = ('item (", " item)*', "named+") if parallel else ("item", "named")
        return "\n".join(
            [
                f"start: listed | {named}",
                rf'listed: {mark(_BEGIN)} " "? "[" {items} "]"',
                f"named: {mark(_BEGIN)} call",
                *json_choice("item", functions),
                *choice("call", functions, lambda name: f"{quoted(name)} {mark(_ARGUMENTS)}", ""),
            ]
        )


def _list(text: CallText) -> Steps[None]:
    """Read what is in the list, and its end."""
    while True:
        yield from text.space()
        good = yield from json_call(text)
        text.settle(good)
        if not good:
            return
        if not (yield from text.skip(",")):
            break
        text.log.begin()
    yield from text.skip("]")


def _named(text: CallText) -> Steps[bool]:
    """Read one call in the newer way, from its name on."""
    end = yield from text.name(_ARGUMENTS, _ID)
    if end == _ID:
        yield from text.run_of(_ID_CHARACTERS)
        end = yield from text.take(_ARGUMENTS)
    yield from text.space()
    return end != "" and (yield from text.arguments())
