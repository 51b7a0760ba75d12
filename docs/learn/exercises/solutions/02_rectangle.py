"""Padding stands on the left, so that the newest token of every row is in the last column."""


def rectangle(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Ids, positions and mask of a padded batch."""
    width = max(map(len, prompts))
    missing = [width - len(tokens) for tokens in prompts]
    ids = [[0] * m + tokens for m, tokens in zip(missing, prompts, strict=True)]
    positions = [[0] * m + list(range(width - m)) for m in missing]
    mask = [[False] * m + [True] * (width - m) for m in missing]
    return ids, positions, mask
