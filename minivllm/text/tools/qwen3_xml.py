"""Calls as Qwen3-Coder writes them (``qwen3_coder.py`` shows the format), read with more patience.

Models that were made smaller or tuned further sometimes leave marks out. A call is one here too when

    <function=get_weather><parameter=city>Berlin</parameter></function>

it has no ``<tool_call>`` around it, or only one half of it; when a value has no ``</parameter>``, but the next ``<parameter=``
or ``</function>`` begins a line; when ``</tool_call>`` stands where ``</function>`` is missing too. The price: a value cannot
hold a line that begins with one of those two marks.
"""

from typing import ClassVar

from minivllm.text.tools.qwen3_coder import Qwen3Coder


class Qwen3Xml(Qwen3Coder):
    """Finds calls in a reply. Written by whoever reads the text."""

    _LENIENT: ClassVar[bool] = True
