"""A position is a block of the table and a place in it: one division."""

import numpy as np


def slots(table: list[int], start: int, count: int, block_size: int) -> list[int]:
    """The KV slots of some positions."""
    return [table[at // block_size] * block_size + at % block_size for at in range(start, start + count)]


def gather(cache: np.ndarray, table: list[int], length: int) -> np.ndarray:
    """The first tokens of a text, in their order."""
    found: np.ndarray = cache[table].reshape(-1, cache.shape[-1])[:length]
    return found
