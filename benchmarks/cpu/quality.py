"""What a precision costs in quality: every way of computing against float32, on text that the model has not seen.

    python benchmarks/cpu/quality.py STORIES [--model FOLDER] [--windows 100] [--window 512]

``STORIES`` is a file of JSON lines (may be .xz) with a ``text`` each; rows with a ``split`` other than "valid" are passed over.
The stories stand one after the other, cut into windows; every token is predicted once. For each way: nats per token, perplexity
against float32's, KL divergence from float32's distribution (nats), and how often the most likely token is the same. A table,
then a line of JSON.
"""

import argparse
import json
import lzma
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm import LLM
from minivllm.attention.base import AttnMeta
from minivllm.models.decoder import ForwardBatch

WAYS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "float32, torch": {"dtype": "float32", "cpu_kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, KV bfloat16": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
    "int8, float32": {"dtype": "float32", "quantization": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


@dataclass(frozen=True)
class Quality:
    """What one way of computing gives, per token."""

    nats: float  # mean surprise at the text
    perplexity_ratio: float  # to float32's
    divergence_nats: float  # Kullback-Leibler, from float32's distribution
    same_share: float  # of tokens where the most likely one is the same


def stories(path: Path) -> list[str]:
    """The held-out texts of the file."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows if row.get("split", "valid") == "valid"]


def windows_of(llm: LLM, texts: list[str], window: int, limit: int) -> list[list[int]]:
    """Token windows of ``window`` + 1 tokens, each beginning with the last token of the one before."""
    stream = [t for text in texts for t in (*llm.tokenizer.encode(text), *llm.info.eos_token_ids[:1])]
    starts = range(0, len(stream) - window - 1, window)
    return [stream[at : at + window + 1] for at in starts][:limit]


@torch.inference_mode()
def logits_of(llm: LLM, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab] float32 of one sequence, computed as a prompt in one step."""
    runner: Any = llm.engine._executor.runner  # type: ignore[attr-defined]
    size, at = llm.info.block_size, torch.arange(len(ids))
    table = np.arange(1, -(-len(ids) // size) + 1, dtype=np.int32)[None]
    meta = AttnMeta(np.array([0, len(ids)]), np.array([len(ids)]), np.zeros(1, dtype=np.int64), table, size, at + size)
    batch = ForwardBatch(torch.tensor(ids), at, (runner.backend.plan(meta),), at)
    found: Tensor = runner.decoder.head(runner.decoder.body(batch, runner.caches))
    return found


def compare(llms: dict[str, LLM], windows: list[list[int]]) -> dict[str, Quality]:
    """Each way against the one called "float32"."""
    sums = {name: np.zeros(3) for name in llms}  # nats, divergence, same choices
    for window in windows:
        targets = torch.tensor(window[1:])
        expected = logits_of(llms["float32"], window[:-1]).log_softmax(-1)
        for name, llm in llms.items():
            found = logits_of(llm, window[:-1]).log_softmax(-1)
            sums[name] += (
                -float(found.gather(1, targets[:, None]).sum()),
                float((expected.exp() * (expected - found)).sum()),
                float((found.argmax(-1) == expected.argmax(-1)).sum()),
            )
    num_tokens = sum(len(window) - 1 for window in windows)
    base = sums["float32"][0]
    return {
        name: Quality(nats / num_tokens, math.exp((nats - base) / num_tokens), divergence / num_tokens, same / num_tokens)
        for name, (nats, divergence, same) in sums.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()
    llms = {name: LLM(asked.model, max_num_seqs=1, **options) for name, options in WAYS.items()}
    windows = windows_of(llms["float32"], stories(asked.stories), asked.window, asked.windows)
    found = compare(llms, windows)
    print(f"{len(windows) * asked.window:,} tokens")
    print(f"{'':<22}{'nats/token':>12}{'perplexity':>12}{'KL, nats':>12}{'same choice':>12}")
    for name, q in found.items():
        print(f"{name:<22}{q.nats:>12.4f}{q.perplexity_ratio - 1:>+12.3%}{q.divergence_nats:>12.2e}{q.same_share:>12.2%}")
    ways = {name: asdict(q) for name, q in found.items()}
    print(json.dumps({"benchmark": "cpu-quality", "tokens": len(windows) * asked.window, "ways": ways}))


if __name__ == "__main__":
    main()
