"""Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``): Llama with biases on q, k and v. https://arxiv.org/abs/2407.10671."""

from dataclasses import replace

from minivllm.models.architectures.llama import layer_windows, llama_like, llama_names
from minivllm.models.hf_config import HFConfig
from minivllm.models.spec import Blueprint


def qwen2(config: HFConfig) -> Blueprint:
    """Read a Qwen2 model."""
    spec = llama_like(config)
    spec = replace(spec, qkv_bias=True, windows=qwen_windows(config, spec.num_layers))
    return Blueprint(spec, llama_names(spec))


def qwen_windows(config: HFConfig, num_layers: int) -> tuple[int | None, ...]:
    """Windows count only with ``use_sliding_window``, and then from layer ``max_window_layers`` on."""
    if not config.flag("use_sliding_window", False):
        return (None,) * num_layers
    window, full = config.optional_integer("sliding_window"), config.values.get("max_window_layers", 28)
    kinds = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    return layer_windows(config, num_layers, window, kinds)
