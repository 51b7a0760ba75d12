"""Calls as DeepSeek's models write them, in both of their ways.

The chat templates of deepseek-ai/DeepSeek-V3, DeepSeek-V3-0324 and DeepSeek-R1-0528 write (here with line breaks between the
marks; there are none but those around the JSON)::

    <｜tool▁calls▁begin｜>
    <｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```
    <｜tool▁call▁end｜>
    <｜tool▁calls▁end｜>

with one inner part for each call. That of DeepSeek-V3.1 leaves the word ``function`` and the fence away::

    <｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>

The bars are U+FF5C and the underscores U+2581. The outer marks may be missing; whitespace may stand between the parts.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from minivllm.text.reply import Function
from minivllm.text.tools.call_text import CallText, Steps, WholeTextParser
from minivllm.text.tools.lark import choice, quoted

_ALL_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_ALL_END: Final = "<｜tool▁calls▁end｜>"
_BEGIN: Final = "<｜tool▁call▁begin｜>"
_SEPARATOR: Final = "<｜tool▁sep｜>"
_END: Final = "<｜tool▁call▁end｜>"
_TYPE: Final = "function"
_FENCE: Final = "```"
_FENCED: Final = "\n```json\n"


class DeepSeekV3(WholeTextParser):
    """Finds calls in one reply. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_ALL_BEGIN, _BEGIN, _SEPARATOR, _END, _ALL_END)

    @staticmethod
    def _read(text: CallText) -> Steps[None]:
        while mark := (yield from text.until(_ALL_BEGIN, _BEGIN)):
            if mark == _ALL_BEGIN:
                yield from text.space()
                mark = yield from text.take(_BEGIN)
            good = mark != "" and (yield from _call(text))
            if text.settle(good):
                yield from text.skip(_ALL_END)

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """See ``ToolParser.grammar``. Both ways are allowed: each model goes on with the one that it was trained on."""
        calls = r'fenced ("\n"? fenced)* | plain+' if parallel else "fenced | plain"
        separator = mark(_SEPARATOR)

        def before(name: str) -> str:
            return f"{quoted(_TYPE)} {separator} {quoted(name + _FENCED)}"

        return "\n".join(
            [
                f"start: {mark(_ALL_BEGIN)} calls {mark(_ALL_END)}",
                f"calls: {calls}",
                f"fenced: {mark(_BEGIN)} typed {mark(_END)}",
                f"plain: {mark(_BEGIN)} bare {mark(_END)}",
                *choice("typed", functions, before, quoted("\n```")),
                *choice("bare", functions, lambda name: f"{quoted(name)} {separator}", ""),
            ]
        )


def _call(text: CallText) -> Steps[bool]:
    """Read one call, from behind its mark to the next."""
    yield from text.space()
    fenced = False
    if (yield from text.take(_TYPE + _SEPARATOR)):
        yield from text.space()
        fenced = (yield from text.following()) != "{"
        if not fenced:
            text.log.name(_TYPE)  # a function of that name, in the newer way
        elif not (yield from text.name("\n")):
            return False
    elif not (yield from text.name(_SEPARATOR)):
        return False
    yield from text.space()
    if fenced and not (yield from text.take(_FENCE + "json")):
        return False
    yield from text.space()
    if not (yield from text.arguments()):
        return False
    yield from text.space()
    if fenced and not (yield from text.take(_FENCE)):
        return False
    yield from text.space()
    return (yield from text.take(_END)) != ""
