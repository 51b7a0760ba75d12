"""What a benchmark asks for: prompts and output lengths.

Two sources: random token ids of chosen lengths (no text decides how long a prompt is, and no prompt is in the prefix cache
unless a shared prefix is wanted), and a JSONL file of real prompts. The same seed gives the same workload everywhere.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minivllm.errors import InvalidOption


@dataclass(frozen=True)
class Item:
    """One request of a benchmark."""

    prompt: str | tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class RandomShape:
    """Lengths of random requests, in tokens.

    Lengths are uniform in ``length * (1 - range_ratio)`` .. ``length * (1 + range_ratio)``; ``prefix_len`` further tokens are
    the same at the start of every prompt.
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        """Refuse lengths that make no request."""
        if not 0.0 <= self.range_ratio < 1.0:
            raise InvalidOption(f"--random-range-ratio must be at least 0 and under 1, got {self.range_ratio:g}.")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise InvalidOption("Input and output lengths must be at least 1, and the prefix length at least 0.")

    @property
    def longest(self) -> int:
        """Prompt plus output of the longest request that may be drawn."""
        grown = [int(n * (1 + self.range_ratio)) for n in (self.input_len, self.output_len)]
        return self.prefix_len + sum(grown)


def random_items(shape: RandomShape, num_items: int, vocab_size: int, avoid: Collection[int], seed: int) -> list[Item]:
    """Draw ``num_items`` requests of random token ids below ``vocab_size``, never one of ``avoid`` (special tokens)."""
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(avoid, dtype=np.int64, count=len(avoid)))

    def lengths(center: int) -> list[int]:
        low, high = int(center * (1 - shape.range_ratio)), int(center * (1 + shape.range_ratio))
        return [int(n) for n in rng.integers(max(low, 1), high + 1, size=num_items)]

    prefix = tuple(rng.choice(allowed, size=shape.prefix_len).tolist())
    inputs, outputs = lengths(shape.input_len), lengths(shape.output_len)
    return [
        Item(prefix + tuple(rng.choice(allowed, size=num_in).tolist()), num_out)
        for num_in, num_out in zip(inputs, outputs, strict=True)
    ]


def custom_items(path: Path, num_items: int, output_len: int) -> list[Item]:
    """Read ``num_items`` requests from a JSONL file: ``{"prompt": text or token ids, "max_tokens": optional}`` a line.

    A file with fewer lines is gone through again. Raises ``InvalidOption`` naming the line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"The dataset {path} cannot be read ({error}).") from None
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            items.append(_item(line, f"{path} line {number}", output_len))
    if not items:
        raise InvalidOption(f"The dataset {path} has no lines; write one JSON object with a prompt per line.")
    return [items[i % len(items)] for i in range(num_items)]


def _item(line: str, where: str, output_len: int) -> Item:
    """Read one line of a custom dataset."""
    try:
        entry = json.loads(line)
        prompt, max_tokens = entry["prompt"], entry.get("max_tokens", output_len)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidOption(f'{where} is not a JSON object with a "prompt".') from None
    if isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise InvalidOption(f'{where}: "prompt" must be a text or a list of token ids.')
    if type(max_tokens) is not int or max_tokens < 1:
        raise InvalidOption(f'{where}: "max_tokens" must be a whole number of at least 1.')
    return Item(prompt, max_tokens)
