"""The rungs by name: what each is called and what it adds. No torch: the command's help shows them."""

from dataclasses import dataclass
from typing import Final

from minivllm.errors import InvalidOption


@dataclass(frozen=True)
class Rung:
    """One rung."""

    name: str
    title: str
    idea: str


RUNGS: Final = (
    Rung("0", "no cache", "The whole text goes through the model again for every token."),
    Rung("1", "KV cache", "Keys and values are kept, so a step computes one token; one request at a time."),
    Rung("2", "static batch", "Several requests side by side, padded to the longest, until the last one ends."),
    Rung("3", "continuous batch, padded", "Rows come and go; their caches are padded and stacked anew in every step."),
    Rung("4", "paged cache", "K and V stay in blocks, and nothing is padded; with torch's kernels, as below."),
    Rung("4k", "kernels for it", "The same steps with kernels that read the blocks where they lie."),
    Rung("5", "prefix cache", "Blocks of equal prompt beginnings are shared and not computed again."),
    Rung("6", "chunked prefill", "Prompts are computed in pieces, in the same steps as the tokens of running requests."),
    Rung("7", "CUDA graphs", "A step's kernels are launched all at once, as they were recorded."),
    Rung("8", "overlap", "The next step is planned and launched while the one before runs."),
)
PLAIN: Final = frozenset({"0", "1", "2", "3"})  # small programs of their own; the others are the engine


def chosen(text: str) -> tuple[Rung, ...]:
    """The rungs of a list such as ``0,3-5`` or ``4k``; a range takes 4k in between. Raises ``InvalidOption``."""
    names = [rung.name for rung in RUNGS]
    found: set[str] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if first not in names or last not in names or names.index(first) > names.index(last):
            raise InvalidOption(f"--rungs: {part.strip()!r} is not a rung or a range of them; rungs are {', '.join(names)}.")
        found.update(names[names.index(first) : names.index(last) + 1])
    return tuple(rung for rung in RUNGS if rung.name in found)
