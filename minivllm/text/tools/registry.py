"""The parsers of calls by name, and which of them a model's chat template asks for.

A chat template that takes functions tells the model how to call them, and writes the calls of earlier replies in that way. So
its source says which parser the model's replies need, by the marks that it writes.
"""

import importlib
from typing import Final, cast

from minivllm.text.reply import ToolParser

PARSERS: Final[dict[str, str]] = {
    "hermes": "minivllm.text.tools.hermes:Hermes",
    "llama3_json": "minivllm.text.tools.llama3_json:Llama3Json",
    "mistral": "minivllm.text.tools.mistral:Mistral",
    "qwen3_coder": "minivllm.text.tools.qwen3_coder:Qwen3Coder",
    "qwen3_xml": "minivllm.text.tools.qwen3_xml:Qwen3Xml",
    "deepseek_v3": "minivllm.text.tools.deepseek_v3:DeepSeekV3",
    "pythonic": "minivllm.text.tools.pythonic:Pythonic",
    "openai": "minivllm.text.tools.openai:OpenAI",
}

# What the first call of a text begins with, where that is always the same and nothing else begins so.
TRIGGERS: Final[dict[str, str]] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "qwen3_coder": "<tool_call>",
    "qwen3_xml": "<tool_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
}

# Parsers whose models' templates take nothing but ids of nine letters and digits when a call is handed back.
SHORT_CALL_IDS: Final = frozenset({"mistral"})

# A parser and the texts that a template for it holds, all of them. The first that fits is taken: what is peculiar stands before
# what others hold as well.
_NEEDLES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("openai", ("<|channel|>",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "</tool_call>", '"arguments":')),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ('{"name": function name, "parameters":',)),
    ("llama3_json", ('{"name": "', '"parameters": ', "<|python_tag|>")),
)


def load_parser(name: str) -> type[ToolParser]:
    """The parser of that name, imported now. Raises ``KeyError`` for a name that ``PARSERS`` does not have."""
    module, _, attribute = PARSERS[name].partition(":")
    return cast(type[ToolParser], getattr(importlib.import_module(module), attribute))


def detect(template: str) -> str | None:
    """The name of the parser for what a chat template makes models write; None for one that is not known, or takes no functions
    (which it would call ``tools``)."""
    source = template.replace('\\"', '"')  # as it stands inside a quoted text of the template
    if "tools" not in source:
        return None
    return next((name for name, needles in _NEEDLES if all(needle in source for needle in needles)), None)
