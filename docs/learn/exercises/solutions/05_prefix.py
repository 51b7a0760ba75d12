"""A block is known by everything up to its end, so the key of a block may simply be that."""

from collections.abc import Sequence


def hits(prompt: Sequence[int], known: Sequence[Sequence[int]], block_size: int) -> int:
    """Tokens at the front of ``prompt`` that need not be computed."""
    keys = {tuple(text[:end]) for text in known for end in range(block_size, len(text) + 1, block_size)}
    found = 0
    while found + block_size < len(prompt) and tuple(prompt[: found + block_size]) in keys:
        found += block_size
    return found
