"""Which reasoning parser has which name. A name is what ``--reasoning-parser`` says."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import cast

from minivllm.text.reply import ReasoningParser

PARSERS: Mapping[str, str] = MappingProxyType(
    {
        "qwen3": "minivllm.text.reasoning.qwen3:Qwen3",
        "deepseek_r1": "minivllm.text.reasoning.deepseek_r1:DeepseekR1",
        "openai_gptoss": "minivllm.text.reasoning.openai_gptoss:OpenAIGptOss",
    }
)


def reasoning_parser(name: str) -> type[ReasoningParser]:
    """The class behind a name in ``PARSERS``; raises ``KeyError`` for another name."""
    module, attribute = PARSERS[name].split(":")
    return cast(type[ReasoningParser], getattr(import_module(module), attribute))
