"""Writes a trained model as a Hugging Face folder: safetensors in bf16, plain JSON, no pickles."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.model import Llama, ModelShape
from training.tokenizer import END_OF_TEXT, IM_END, save_tokenizer, special_id


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """The whole folder, but for the model card, which people write."""
    save_tokenizer(tokenizer, folder, model.shape.max_tokens)
    stops = [special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, IM_END)]
    _write_json(folder / "config.json", hf_config(model.shape, stops[0]))
    _write_json(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": stops[0]})
    weights = {name: weight.detach().cpu().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone


def load_exported(folder: Path) -> Llama:
    """The other way round, for sampling: an exported folder as a plain model in float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = ModelShape(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp_dim=config["intermediate_size"],
        max_tokens=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    model = Llama(shape, seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def hf_config(shape: ModelShape, eos_token_id: int) -> dict[str, object]:
    """`config.json`. The rotation base is there twice: `rope_theta` for older readers, `rope_parameters` for newer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
