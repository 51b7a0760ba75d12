"""Only sizes that occur are worth a graph, so it is a shortest way from size to size."""

from functools import cache


def sizes(steps: dict[int, int], most: int) -> list[int]:
    """The sizes to capture."""
    rows = sorted(steps)

    @cache
    def best(end: int, left: int) -> tuple[int, tuple[int, ...]]:
        """The least that is wasted on the first ``end`` sizes with so many graphs, and these."""
        if end == 0:
            return 0, ()
        if left == 0:
            return 10**18, ()
        top = rows[end - 1]
        tries = []
        for begin in range(end):
            cost, chosen = best(begin, left - 1)
            tries.append((cost + sum(steps[n] * (top - n) for n in rows[begin:end]), (*chosen, top)))
        return min(tries)

    return list(best(len(rows), most)[1])
