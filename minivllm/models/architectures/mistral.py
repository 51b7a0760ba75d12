"""Mistral (``MistralForCausalLM``): Llama with a sliding window on every layer, where config.json gives one.

https://arxiv.org/abs/2310.06825. Later releases set ``sliding_window`` to null.
"""

from dataclasses import replace

from minivllm.models.architectures.llama import llama_like, llama_names
from minivllm.models.hf_config import HFConfig
from minivllm.models.spec import Blueprint


def mistral(config: HFConfig) -> Blueprint:
    """Read a Mistral model."""
    spec = llama_like(config)
    spec = replace(spec, windows=(config.optional_integer("sliding_window"),) * spec.num_layers)
    return Blueprint(spec, llama_names(spec))
