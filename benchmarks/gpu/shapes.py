"""The models that are measured on a GPU, and the options that their engines start with.

Two shapes at full size, A (0.6B) and B (8B), with random weights made on the device: speed does not depend on what the weights
are, so nothing is downloaded. The vocabulary is made up too (``benchmarks.cpu.shapes`` says how). ``tiny`` is for seeing on any
machine that the programs work: its workloads are the same ones, made smaller.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.cpu.shapes import QWEN3, Shape, make_model_folder

MODELS_FOLDER: Final = Path("build/bench-gpu/models")
MAX_POSITIONS: Final = 40_960
LLAMA: Final = Shape(
    "llama-3.1-8b",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 128255,
        "eos_token_id": 128255,
        "torch_dtype": "bfloat16",
    },
    has_checkpoint=False,
)
TINY_SIZES: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 1024,
    "bos_token_id": 1023,
    "eos_token_id": 1023,
}


@dataclass(frozen=True)
class Model:
    """A shape, its engine's options, and by how much counts and lengths of the workloads are divided."""

    name: str
    shape: Shape
    options: Mapping[str, Any]
    serving: Mapping[str, Any]  # over ``options``, for a server
    shrink: int = 1

    def less(self, number: int) -> int:
        """A count or a length of a workload, made smaller where the model is."""
        return max(1, number // self.shrink)

    def folder(self, parent: Path) -> Path:
        """The model's folder (config and tokenizer), made under ``parent``."""
        return make_model_folder(self.shape, parent)


def _qwen3(name: str, changes: Mapping[str, Any]) -> Shape:
    config = {key: value for key, value in QWEN3.config.items() if key != "dtype"}
    return Shape(name, {**config, "max_position_embeddings": MAX_POSITIONS, "torch_dtype": "bfloat16", **changes}, False)


FULL: Final = {
    "load_format": "dummy",
    "max_model_len": MAX_POSITIONS,  # the longest prompt that is measured, in the one engine of all rows
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.9,
}
# A server's steps are smaller: a stream's next token waits for the prompts that are computed beside it.
FULL_SERVING: Final = {"max_num_batched_tokens": 2048}
TINY: Final = {
    "load_format": "dummy",
    "max_model_len": MAX_POSITIONS // 16,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 * 2**20,
}
MODELS: Final[Mapping[str, Model]] = {
    "A": Model("A", _qwen3("qwen3-0.6b", {}), FULL, FULL_SERVING),
    "B": Model("B", LLAMA, FULL, FULL_SERVING),
    "tiny": Model("tiny", _qwen3("tiny", TINY_SIZES), TINY, {}, shrink=16),
}


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments that all programs take."""
    parser.add_argument("--model", choices=tuple(MODELS), default="A")
    parser.add_argument("--models-folder", type=Path, default=MODELS_FOLDER, metavar="FOLDER", help="where models are made")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine; may be repeated"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines here")


def chosen_options(model: Model, given: list[str], *, serving: bool = False) -> dict[str, Any]:
    """The model's options with those of ``--option`` over them; ``NAME=null`` leaves one to the engine."""
    chosen: dict[str, Any] = {**model.options, **(model.serving if serving else {})}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--option {text}: write NAME=VALUE.")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return {name: value for name, value in chosen.items() if value is not None}


def option_flags(options: Mapping[str, Any]) -> list[str]:
    """The same options as arguments of ``mini-vllm serve``."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def chosen_rows(text: str) -> list[int]:
    """Row numbers written as ``1,3-9``."""
    rows: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        rows += range(int(first), int(last or first) + 1)
    return rows
