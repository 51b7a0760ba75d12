"""Calls as Hermes 2 Pro, Hermes 3, Qwen2.5, Qwen3 (not the Coder) and the many models trained like them write them.

The chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B, Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B ask for::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

once for each call, with plain text before it if the model likes. Whitespace may stand anywhere between the parts.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from minivllm.text.reply import Function
from minivllm.text.tools.call_text import CallText, Steps, WholeTextParser
from minivllm.text.tools.json_call import json_call
from minivllm.text.tools.lark import json_choice

_BEGIN: Final = "<tool_call>"
_END: Final = "</tool_call>"


class Hermes(WholeTextParser):
    """Finds calls in one reply. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_BEGIN, _END)

    @staticmethod
    def _read(text: CallText) -> Steps[None]:
        while (yield from text.until(_BEGIN)):
            yield from text.space()
            good = yield from json_call(text)
            if good:
                yield from text.space()
                good = (yield from text.take(_END)) != ""
            text.settle(good)

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """See ``ToolParser.grammar``."""
        return "\n".join(
            [
                r'start: call ("\n" call)*' if parallel else "start: call",
                rf'call: {mark(_BEGIN)} "\n" body "\n" {mark(_END)}',
                *json_choice("body", functions),
            ]
        )
