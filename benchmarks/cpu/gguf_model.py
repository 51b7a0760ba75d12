"""The same random GPT-2 as a GGUF file, which is what llama.cpp reads.

llama.cpp has its own names for tensors and wants linears [out, in] where GPT-2's checkpoint has them [in, out]. The vocabulary
goes into the file too. Its tokenizer is never used for prompts (they are sent as ids), only for turning output ids into text.
"""

import subprocess
from pathlib import Path
from typing import Any

from benchmarks.cpu.shapes import Shape, token_texts

NORMAL, CONTROL = 1, 3  # llama.cpp's kinds of token
ALL_F32 = 0  # llama.cpp's name for the file's kind of numbers

OUTER = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
MODULES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(checkpoint_name: str) -> tuple[str, bool]:
    """llama.cpp's name of a tensor of the checkpoint, and whether it is stored transposed there."""
    name = checkpoint_name.removeprefix("transformer.")
    if name in OUTER:
        return OUTER[name], False
    module, part = name.rsplit(".", 1)
    if module == "ln_f":
        return f"output_norm.{part}", False
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{MODULES[inner]}.{part}", inner.split(".")[-1].startswith("c_") and part == "weight"


def write_gguf(shape: Shape, model_folder: Path, path: Path) -> None:
    """Convert the checkpoint of ``model_folder`` to ``path``, in float32."""
    from gguf import GGUFWriter
    from safetensors import safe_open
    from tokenizers import pre_tokenizers

    config: Any = shape.config
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(ALL_F32)
    texts = token_texts(shape.vocab_size, pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([NORMAL] * shape.eos_id + [CONTROL])
    writer.add_token_merges(["a a"])  # the list may not be empty; no text is ever split by it
    writer.add_bos_token_id(shape.eos_id)
    writer.add_eos_token_id(shape.eos_id)
    with safe_open(model_folder / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            theirs, transposed = gguf_name(name)
            array = tensors.get_tensor(name)
            writer.add_tensor(theirs, array.T.copy() if transposed else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def make_gguf(shape: Shape, model_folder: Path, kind: str, quantizer: str) -> Path:
    """The model as a GGUF file of a kind ("F32", "Q8_0", ...), beside its folder. Made once."""
    plain = model_folder.parent / f"{shape.name}-F32.gguf"
    wanted = model_folder.parent / f"{shape.name}-{kind}.gguf"
    if not plain.is_file():
        write_gguf(shape, model_folder, plain)
    if not wanted.is_file():
        part = wanted.with_suffix(".part")
        subprocess.run([quantizer, str(plain), str(part), kind], check=True, capture_output=True)
        part.rename(wanted)
    return wanted
