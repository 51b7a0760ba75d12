"""Calls as Llama 3.1, 3.2 and 3.3 write those of the caller's own functions.

The chat templates of meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-3B-Instruct ask for a reply that is the call and nothing
else, as JSON::

    {"name": "get_weather", "parameters": {"city": "Paris"}}

Larger models like to write ``<|python_tag|>`` before it, and several calls with ``;`` between them. No mark says that a call
follows, so a reply is looked at only where it begins with ``{`` or the tag; any other is content, whatever it holds further
on. In one that is looked at, a call may also follow text, behind a ``;`` or a tag.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from minivllm.text.reply import Function
from minivllm.text.tools.call_text import CallText, Steps, WholeTextParser
from minivllm.text.tools.json_call import json_call
from minivllm.text.tools.lark import json_choice

_TAG: Final = "<|python_tag|>"
_SEPARATOR: Final = ";"


class Llama3Json(WholeTextParser):
    """Finds calls in one reply. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_TAG,)

    @staticmethod
    def _read(text: CallText) -> Steps[None]:
        yield from text.space()
        text.log.begin()
        tag = yield from text.take(_TAG)
        yield from text.space()
        if not tag and (yield from text.following()) != "{":
            text.log.refuse()
            yield from text.rest()
            return
        while True:
            good = yield from json_call(text)
            if text.settle(good) and (yield from text.skip(_SEPARATOR)):
                yield from text.space()
                text.log.begin()
                yield from text.take(_TAG)
            elif not (yield from text.until(_SEPARATOR, _TAG)):
                return
            yield from text.space()

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """See ``ToolParser.grammar``. Without the tag, as the templates ask for it."""
        start = 'start: call ("; " call)*' if parallel else "start: call"
        return "\n".join([start, *json_choice("call", functions, "parameters")])
