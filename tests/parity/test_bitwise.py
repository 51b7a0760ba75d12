"""In batch-invariant mode a request's logits are bitwise the same however it is computed.

For each architecture with random weights, and for the bundled model, 32 prompts of mixed lengths and 64 greedy tokens are run
(a) each alone, (b) all in one batch, (c) in chunks of 16 tokens, (d) with a cache so small that sequences are preempted, and
(e) a second time, with every prefix cached. Counts assert that chunks, preemptions and hits really happened.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity_lab import CASES, NUM_NEW, NUM_PROMPTS, five_ways, make_prompts
from tiny_models import SMALL


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("case_folder", CASES, indirect=True)
def test_logits_are_bitwise_equal_in_batch_invariant_mode(case_folder: Path, kernels: str) -> None:
    prompts = make_prompts(SMALL["vocab_size"])
    runs = five_ways(case_folder, prompts, batch_invariant=True, cpu_kernels=kernels)
    alone = runs["alone"]
    assert np.median([len(set(t)) for t in alone.tokens]) >= 16, "greedy text does not vary enough to prove anything"
    assert len(alone.logits) == NUM_PROMPTS * NUM_NEW
    for way, run in runs.items():
        assert run.tokens == alone.tokens, way
        for key, row in alone.logits.items():
            assert torch.equal(run.logits[key], row), f"{way}: request {key[0]}, position {key[1]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "cpu_kernels": "torch"},
        {"dtype": "bfloat16", "quantization": "int8"},
        {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_the_bundled_model_is_bitwise_equal_in_every_way(bundled_model: Path, options: dict[str, str]) -> None:
    prompts = make_prompts(4000)
    runs = five_ways(bundled_model, prompts, batch_invariant=True, **options)
    for way, run in runs.items():
        assert run.tokens == runs["alone"].tokens, way
        for key, row in runs["alone"].logits.items():
            assert torch.equal(run.logits[key], row), f"{way}: request {key[0]}, position {key[1]}"
