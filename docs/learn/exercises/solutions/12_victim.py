"""What is lost must be computed again: so the least of it, but not at the expense of whoever is next to be done."""

from collections.abc import Sequence
from typing import Any


def victim(candidates: Sequence[Any]) -> Any:
    """The one that gives way."""
    return min(reversed(candidates[1:] or candidates), key=lambda request: request.computed)
