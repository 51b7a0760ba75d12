"""K and V, of every layer, of every head that has its own."""

from typing import Any


def kv_bytes(config: dict[str, Any], number_bytes: int) -> int:
    """Bytes of one token in the cache."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * head_dim * number_bytes)


def most_texts(memory_bytes: int, tokens: int, block_size: int, config: dict[str, Any], number_bytes: int) -> int:
    """Texts that fit, in whole blocks."""
    blocks = memory_bytes // (block_size * kv_bytes(config, number_bytes)) - 1  # block 0 is scratch
    return max(0, blocks) // -(-tokens // block_size)
