"""Qwen3 (``Qwen3ForCausalLM``): Llama with q and k normed per head, and heads of a size of their own.

https://arxiv.org/abs/2505.09388.
"""

from dataclasses import replace

from minivllm.models.architectures.llama import llama_like, llama_names
from minivllm.models.architectures.qwen2 import qwen_windows
from minivllm.models.hf_config import HFConfig
from minivllm.models.spec import Blueprint


def qwen3(config: HFConfig) -> Blueprint:
    """Read a Qwen3 model."""
    bias = config.flag("attention_bias", False)
    spec = llama_like(config)
    spec = replace(spec, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=qwen_windows(config, spec.num_layers))
    return Blueprint(spec, llama_names(spec))
