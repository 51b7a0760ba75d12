"""What reduced precision may cost: bounds on the bundled model and text that it was not trained on."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

# name -> (perplexity against float32's, KL divergence in nats, share of equal choices)
BOUNDS = {
    "float32, torch": (1.00001, 1e-6, 0.999),
    "bfloat16": (1.002, 5e-4, 0.99),
    "float32, KV bfloat16": (1.001, 1e-4, 0.995),
    "int8, float32": (1.01, 2e-3, 0.97),
    "int8, bfloat16": (1.01, 2e-3, 0.97),
}


@pytest.mark.slow
def test_precisions_are_near_float32(repo: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo))  # `benchmarks` is no part of the package
    quality: Any = import_module("benchmarks.cpu.quality")
    options = {"max_num_seqs": 1, "num_threads": 1, "num_gpu_blocks_override": 40, "max_model_len": 512}
    llms = {name: quality.LLM(**options, **way) for name, way in quality.WAYS.items()}
    texts = quality.stories(shared_data / "tinystories" / "tinystories.jsonl.xz")
    found = quality.compare(llms, quality.windows_of(llms["float32"], texts[:30], 512, 8))
    assert found.keys() == {"float32", *BOUNDS}
    assert 1.2 < found["float32"].nats < 2.1
    for name, (perplexity, divergence, same) in BOUNDS.items():
        way = found[name]
        assert 1 / perplexity < way.perplexity_ratio < perplexity, name
        assert 0 <= way.divergence_nats + 1e-9 < divergence and way.same_share > same, name
    assert found["int8, float32"].divergence_nats > 1e-6  # it is another precision indeed
