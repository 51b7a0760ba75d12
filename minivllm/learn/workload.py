"""The requests that every rung serves: prompts and outputs of mixed lengths, groups of which begin with the same tokens.

Prompts are random token ids, and every output has exactly the length asked for: how fast a model is does not depend on what it
says, and so every rung has the same tokens to compute.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from minivllm.errors import InvalidOption
from minivllm.learn.desk import Request


@dataclass(frozen=True)
class Workload:
    """What is asked for. Lengths are uniform in length * (1 - spread) .. length * (1 + spread)."""

    num_requests: int = 32
    num_prefixes: int = 2  # different beginnings, which requests have in turn
    prefix_len: int = 96
    input_len: int = 64  # tokens behind the prefix
    output_len: int = 40
    spread: float = 0.75
    request_rate: float = 0.0  # arrivals per second, evenly spaced; 0: all at once
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no requests."""
        least = {"num_requests": 1, "num_prefixes": 1, "prefix_len": 0, "input_len": 1, "output_len": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidOption(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}.")
        if not 0.0 <= self.spread < 1.0:
            raise InvalidOption(f"--spread must be at least 0 and under 1, got {self.spread:g}.")
        if not 0.0 <= self.request_rate < float("inf"):
            raise InvalidOption(f"--request-rate must be 0 (all at once) or requests a second, got {self.request_rate:g}.")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that may be drawn."""
        return self.prefix_len + int(self.input_len * (1 + self.spread))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest output."""
        return self.longest_prompt + int(self.output_len * (1 + self.spread))

    def check_fits(self, max_positions: int) -> None:
        """Raise ``InvalidOption`` where the longest text does not fit the model."""
        if self.longest > max_positions:
            raise InvalidOption(
                f"Prompts and outputs of up to {self.longest} tokens do not fit the model's context of {max_positions}; "
                "lower --prefix-len, --input-len or --output-len."
            )

    def requests(self, vocab_size: int, avoid: Collection[int]) -> list[Request]:
        """Draw the requests, of token ids below ``vocab_size`` and never one of ``avoid``; the same for the same seed."""
        rng = np.random.default_rng(self.seed)
        allowed = np.setdiff1d(np.arange(vocab_size), np.array(sorted(avoid), dtype=np.int64))

        def lengths(middle: int) -> list[int]:
            low, high = max(1, int(middle * (1 - self.spread))), int(middle * (1 + self.spread))
            return [int(n) for n in rng.integers(low, high + 1, size=self.num_requests)]

        def text(length: int) -> tuple[int, ...]:
            return tuple(int(token) for token in rng.choice(allowed, size=length))

        prefixes = [text(self.prefix_len) for _ in range(self.num_prefixes)]
        inputs, outputs = lengths(self.input_len), lengths(self.output_len)
        gap_s = 1.0 / self.request_rate if self.request_rate else 0.0
        return [
            Request(f"r{i}", prefixes[i % self.num_prefixes] + text(inputs[i]), outputs[i], i * gap_s)
            for i in range(self.num_requests)
        ]
