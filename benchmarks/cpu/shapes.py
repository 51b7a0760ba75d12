"""The models that are measured: real shapes, random weights, made on the spot.

Speed does not depend on what the weights are, so nothing is downloaded. It does depend on what the text looks like: a token
that is half a character makes a streaming server hold text back. So the made-up vocabulary has the 256 bytes that a byte-level
tokenizer needs, then words of four letters, and prompts are drawn from the words.

One checkpoint serves every contender (safetensors in Hugging Face layout, float32); what wants another format converts it, so
all compute the same function. The same seed gives the same weights on every machine.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

NUM_BYTES: Final = 256
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
END_OF_TEXT: Final = "<|endoftext|>"
WEIGHT_STD: Final = 0.02  # GPT-2's initialisation


@dataclass(frozen=True)
class Shape:
    """A model's config.json and whether a checkpoint is made for it (else only dummy weights can be measured)."""

    name: str
    config: Mapping[str, Any]
    has_checkpoint: bool

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.config["vocab_size"])

    @property
    def eos_id(self) -> int:
        """The last id."""
        return self.vocab_size - 1

    @property
    def avoided_ids(self) -> frozenset[int]:
        """Ids that no prompt holds: single bytes and the end of text."""
        return frozenset({*range(NUM_BYTES), self.eos_id})


GPT2: Final = Shape(
    "gpt2",
    {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "n_ctx": 1024,
        "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "dtype": "float32",
    },
    has_checkpoint=True,
)
QWEN3: Final = Shape(
    "qwen3-0.6b",
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151935,
        "eos_token_id": 151935,
        "dtype": "bfloat16",
    },
    has_checkpoint=False,
)
SHAPES: Final[Mapping[str, Shape]] = {shape.name: shape for shape in (GPT2, QWEN3)}


def token_texts(vocab_size: int, byte_letters: list[str]) -> list[str]:
    """The text of every id: bytes (as the letters that stand for them), four-letter words, the end of text."""
    words = [_word(i) for i in range(vocab_size - NUM_BYTES - 1)]
    return [*sorted(byte_letters), *words, END_OF_TEXT]


def _word(number: int) -> str:
    """The number in base 26, four letters long."""
    letters = []
    for _ in range(4):
        number, rest = divmod(number, len(LETTERS))
        letters.append(LETTERS[rest])
    return "".join(reversed(letters))


def gpt2_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a GPT-2 checkpoint. Linears are stored [in, out] ("Conv1D")."""
    hidden = config["n_embd"]
    yield "transformer.wte.weight", (config["vocab_size"], hidden)
    yield "transformer.wpe.weight", (config["n_positions"], hidden)
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        yield from ((f"{layer}.{norm}.{part}", (hidden,)) for norm in ("ln_1", "ln_2") for part in ("weight", "bias"))
        linears = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden),
            "mlp.c_proj": (4 * hidden, hidden),
        }
        for name, (num_in, num_out) in linears.items():
            yield f"{layer}.{name}.weight", (num_in, num_out)
            yield f"{layer}.{name}.bias", (num_out,)
    yield "transformer.ln_f.weight", (hidden,)
    yield "transformer.ln_f.bias", (hidden,)


def make_model_folder(shape: Shape, parent: Path) -> Path:
    """The shape's folder under ``parent``: config.json, tokenizer and, where there is one, the checkpoint. Made once."""
    folder = parent / shape.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1), encoding="utf-8")
    if not (folder / "tokenizer.json").is_file():
        _write_tokenizer(shape, folder)
    if shape.has_checkpoint and not (folder / "model.safetensors").is_file():
        _write_checkpoint(shape, folder / "model.safetensors")
    return folder


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    texts = token_texts(shape.vocab_size, pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def _write_checkpoint(shape: Shape, path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {}
    for name, dims in gpt2_tensors(shape.config):
        if name.endswith(".bias"):
            tensors[name] = np.zeros(dims, np.float32)
        elif ".ln_" in name:
            tensors[name] = np.ones(dims, np.float32)
        else:
            tensors[name] = rng.standard_normal(dims, np.float32) * np.float32(WEIGHT_STD)
    part = path.with_suffix(".part")  # a file that was not finished must not look like one that was
    save_file(tensors, part, metadata={"format": "pt"})
    part.rename(path)
