"""Exercise 11: how much memory is a token?

Write two functions. ``kv_bytes(config, number_bytes)``: what K and V of one token take, where ``config`` is a model's
config.json (``num_hidden_layers``, ``num_attention_heads``, ``hidden_size``; ``num_key_value_heads`` and ``head_dim`` may
be absent: then all heads have their own, and head_dim is hidden_size over heads). ``most_texts(memory_bytes, tokens,
block_size, config, number_bytes)``: how many texts of so many tokens fit into a cache of this size, in whole blocks, one
block of the cache being nobody's. The engine is asked whether you are right.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import minivllm
from minivllm.learn.scenes import make_engine

LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
GPT2 = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768}
QWEN_06B = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024, "head_dim": 128}


@pytest.mark.parametrize(("config", "expected"), [(LLAMA_8B, 128 * 2**10), (GPT2, 36 * 2**10), (QWEN_06B, 112 * 2**10)])
def test_models_that_are_known(solution: ModuleType, config: dict[str, Any], expected: int) -> None:
    assert solution.kv_bytes(config, 2) == expected


@pytest.mark.parametrize(("dtype", "number_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_the_bundled_model(solution: ModuleType, dtype: str, number_bytes: int) -> None:
    folder = Path(minivllm.__file__).parent / "assets" / "stories"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    info = make_engine(dtype=dtype).info
    assert solution.kv_bytes(config, number_bytes) == info.kv_bytes / (info.num_blocks * info.block_size)


@pytest.mark.parametrize(
    ("gib", "tokens", "expected"), [(1, 1024, 7), (1, 1000, 8), (1, 1, 511), (40, 4096, 79), (0.001, 100, 0)]
)
def test_how_many_fit(solution: ModuleType, gib: float, tokens: int, expected: int) -> None:
    assert solution.most_texts(int(gib * 2**30), tokens, 16, LLAMA_8B, 2) == expected
