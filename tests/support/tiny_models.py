"""Small random models of every served family, written by transformers itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 199, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**SMALL, **changes})


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Config(**{**SMALL, "head_dim": 24, **changes})


# Name -> how its config is made. A new architecture adds its rows here.
CASES: Mapping[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-untied-inner": lambda: transformers.GPT2Config(**{**GPT2, "n_inner": 80, "tie_word_embeddings": False}),
    "llama-gqa": lambda: _llama(),
    "llama-mha-tied": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-mqa-biases": lambda: _llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama-head-dim-theta": lambda: _llama(head_dim=40, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama3-scaling": lambda: _llama(rope_parameters=LLAMA3),
    "llama-linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}),
    "llama-yarn": lambda: _llama(rope_parameters=YARN),
    "llama-gelu": lambda: _llama(hidden_act="gelu"),
    "mistral-window": lambda: transformers.MistralConfig(**{**SMALL, "sliding_window": 23}),
    "mistral-full": lambda: transformers.MistralConfig(**{**SMALL, "sliding_window": None, "head_dim": 32}),
    "qwen2": lambda: transformers.Qwen2Config(**{**SMALL, "tie_word_embeddings": True}),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **{**SMALL, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
    ),
    "qwen3": lambda: _qwen3(),
    "qwen3-mha-tied-bias": lambda: _qwen3(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True),
    "qwen3-window": lambda: _qwen3(
        use_sliding_window=True, sliding_window=17, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random weights under which greedy text varies: what the layers add outweighs the token itself."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data.normal_(0.0, 0.03, generator=generator)
            if "norm" in name or "ln_" in name:
                p.data += 0.0 if name.endswith("bias") else 1.0
        elif any(part in name for part in ("embed_tokens", "wte", "wpe")):
            p.data.normal_(0.0, 0.3, generator=generator)
        else:
            fan_in = p.shape[0] if name.startswith("transformer.h") else p.shape[1]
            p.data.normal_(0.0, 2.0 * fan_in**-0.5, generator=generator)


def save_model(case: str, folder: Path, **how: Any) -> Any:
    """Write a model in ``folder`` and return transformers' own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CASES[case](), attn_implementation="eager").eval()
    randomize(model, sum(map(ord, case)))
    model.save_pretrained(folder, **how)
    return model
