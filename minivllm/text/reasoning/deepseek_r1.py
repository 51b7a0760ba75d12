"""Reasoning as DeepSeek-R1 (deepseek-ai/DeepSeek-R1, -0528 and the distilled models) writes it.

    The user wants ...
    </think>

    The answer.

These models always reason, and the ``<think>`` that opens the block is often not part of the reply: newer chat templates put it
at the end of the prompt, and with older ones the model leaves it out. So a reply is reasoning from its first character, unless
the prompt itself ends with a closed block. The rest is as in ``qwen3.py``, whitespace at the marks included; a ``<think>`` at
the beginning belongs to the format.
"""

from typing import ClassVar

from minivllm.text.reasoning.qwen3 import Qwen3


class DeepseekR1(Qwen3):
    """Parts the reasoning from the answer. Written by whoever reads the text."""

    _UNMARKED: ClassVar[bool] = True
