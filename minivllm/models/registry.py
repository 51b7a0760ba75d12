"""Which architecture is read by which file. A name is what config.json says under ``architectures``."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import cast

from minivllm.errors import UnsupportedModel
from minivllm.models.hf_config import HFConfig
from minivllm.models.spec import Blueprint

# Imported when asked: a model's file costs nothing where the model is not served.
ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "GPT2LMHeadModel": "gpt2:gpt2",
        "LlamaForCausalLM": "llama:llama",
        "MistralForCausalLM": "mistral:mistral",
        "Qwen2ForCausalLM": "qwen2:qwen2",
        "Qwen3ForCausalLM": "qwen3:qwen3",
    }
)


def read_model(config: HFConfig) -> Blueprint:
    """Read a model's config; raises ``UnsupportedModel`` or ``BrokenModelFolder``."""
    name = config.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedModel(f"The architecture {name} is not served; served are {', '.join(ARCHITECTURES)}.")
    module, function = ARCHITECTURES[name].split(":")
    return cast(Blueprint, getattr(import_module(f"minivllm.models.architectures.{module}"), function)(config))
